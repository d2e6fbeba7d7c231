"""A cuDNN that opens a library which was not installed with it."""

import logging
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from pretrain.config.presets import PRESETS
from pretrain.loop.log import RunLog
from pretrain.model import cudnn
from pretrain.start import doctor


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a cuDNN as the wheel of 9.20.0.48 has it, loaded by this process."""
    folder = tmp_path / "nvidia cudnn" / "lib"
    folder.mkdir(parents=True)
    graph = folder / "libcudnn_graph.so.9"
    names = ("engines_precompiled.so", "engines_tensor_ir.so", "graph.so.9")
    graph.write_bytes(b"\x7fELF" + b"\0".join(b"libcudnn_" + name.encode() for name in names))
    (folder / "libcudnn_engines_precompiled.so.9").touch()
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 00000000 fe:00 42   /usr/lib/libc.so.6\n"
        "7f01-7f02 rw-p 00000000 00:00 0 \n"
        + "".join(f"7f0{i}-7f0{i + 1} r--p 00000000 fe:00 4{i}   {graph}\n" for i in (2, 3))
    )
    monkeypatch.setattr(cudnn, "_MAPS", maps)
    return graph


def test_two_of_them_are_named(graph: Path, tmp_path: Path) -> None:
    (graph.parent / "libcudnn_engines_tensor_ir.so.9").touch()
    assert cudnn.problems() == []
    other = tmp_path / "system" / "libcudnn_graph.so.9.14.0"
    other.parent.mkdir()
    other.write_bytes(b"\x7fELF")
    with (tmp_path / "maps").open("a") as maps:
        maps.write(f"7f05-7f06 r--p 00000000 fe:00 50   {other}\n")
    (problem,) = cudnn.problems()
    assert f"2 cuDNNs are loaded, of {graph.parent} and {other.parent}" in problem
    assert "CUDNN_HOME" in problem


def test_what_is_missing_is_named_with_what_to_do(graph: Path) -> None:
    assert cudnn.loaded() == [graph]
    (problem,) = cudnn.problems()
    assert f"{graph.parent} opens libcudnn_engines_tensor_ir.so by name" in problem
    assert "nvidia-cudnn-cu13>=9.21" in problem


def test_a_whole_one_is_no_problem(graph: Path) -> None:
    (graph.parent / "libcudnn_engines_tensor_ir.so.9").touch()
    assert cudnn.lacking(graph) == []
    assert cudnn.problems() == []


def test_no_cudnn_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("", None):
        maps = tmp_path / f"maps-{text is None}"
        if text is not None:
            maps.write_text(text)
        monkeypatch.setattr(cudnn, "_MAPS", maps)
        assert cudnn.problems() == []


def test_doctor_does_not_call_it_ready(graph: Path, capsys) -> None:
    doctor.run_doctor()
    output = capsys.readouterr().out
    assert f"in {graph.parent}" in output
    assert "libcudnn_engines_tensor_ir.so" in output
    missing = output.splitlines()[-1].split("Missing for GPU: ")[1]
    assert "one cuDNN, with all its libraries" in missing.split(". ")[0]


def test_a_run_on_a_gpu_says_so_before_its_first_step(
    graph: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = Mock(spec=RunLog, _log=Mock(), _config=PRESETS["debug"]())
    model = Mock(transformer_impl="local", fp8=None)
    with caplog.at_level(logging.WARNING):
        RunLog.built(log, model)
        assert not caplog.text  # no GPU
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        RunLog.built(log, model)
    assert "opens libcudnn_engines_tensor_ir.so by name" in caplog.text
