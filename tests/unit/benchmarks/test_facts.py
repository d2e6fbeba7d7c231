"""benchmarks/measuring/facts.py, and that what records a decoder leaves it alone."""

import argparse
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from measuring import facts, standby
from measuring.rows import Rows
from megatron_ladder.layers.attention.choice import CoreAttention
from pretrain.bench.recorder import Recorder


def test_a_recorder_that_is_closed_leaves_the_decoder_as_it_was() -> None:
    """Its hooks wait for the device at every sub-module: on a GPU a decoder that kept them was slow."""
    hooked = torch.nn.Module()
    hooked.linear_qkv = hooked.linear_fc1 = torch.nn.Linear(2, 2)
    layer = SimpleNamespace(self_attention=hooked, mlp=hooked)
    decoder: Any = SimpleNamespace(
        model=SimpleNamespace(residual="ladder"),
        block=SimpleNamespace(layers=[layer], config=SimpleNamespace(halves=False)),
    )
    found = Recorder(decoder, 0)
    assert hooked._forward_pre_hooks and hooked.linear_qkv._forward_hooks
    found.close()
    assert not any(
        (hooked._forward_pre_hooks, hooked._forward_hooks, hooked.linear_qkv._forward_hooks)
    )


def test_a_cudnn_that_does_not_fit_takes_no_result_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> int:
        raise RuntimeError("cuDNN version incompatibility")

    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    found = facts.header("a GPU", argparse.Namespace())
    assert found["versions"]["cudnn"] == "cuDNN version incompatibility"


def test_a_standby_imports_what_chooses_the_cudnn_before_what_loads_one() -> None:
    assert standby.IMPORTED.index("megatron_ladder") < min(
        standby.IMPORTED.index(name) for name in ("torch", "transformer_engine.pytorch")
    )


def test_attention_is_what_transformer_engine_says_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    class TEDotProductAttention(torch.nn.Module):
        pass

    model = torch.nn.Module()
    assert facts.attention_of(model) == "none"
    model.core_attention = torch.nn.Identity()
    taken_of_torch = CoreAttention("torch", "cuDNN")
    model.core_attention.config = SimpleNamespace(core_attention=taken_of_torch)
    assert facts.attention_of(model) == "torch: cuDNN"
    model.core_attention = TEDotProductAttention()
    taken = dict.fromkeys(("use_flash_attention", "use_fused_attention", "use_unfused_attention"))
    te: Any = ModuleType("dot_product_attention")
    te._attention_backends = taken
    name = "transformer_engine.pytorch.attention.dot_product_attention"
    monkeypatch.setitem(sys.modules, name, te)
    assert "not asked" in facts.attention_of(model)
    taken["use_unfused_attention"] = True
    assert "UNFUSED" in facts.attention_of(model)
    taken.update(use_fused_attention=True, fused_attention_backend="F16_arbitrary_seqlen")
    assert facts.attention_of(model) == "Transformer Engine: cuDNN F16_arbitrary_seqlen"


def test_clock_and_power_are_asked_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a program that answers when there is load, or never."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    load = tmp_path / "load"

    def run() -> None:
        load.touch()
        time.sleep(0.01)

    program = tmp_path / "nvidia-smi"
    answers = f"while [ ! -e {load} ]; do sleep 0.01; done; [ $2 = GPU-1234 ] && echo 1755, 640.5"
    program.write_text(f"#!/bin/sh\n{answers}\n")
    program.chmod(0o755)
    assert facts.under_load(run) == {"sm_clock_mhz": 1755, "power_w": 640.5}
    monkeypatch.setattr(facts, "PATIENCE_S", 0.1)
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    assert facts.under_load(run) == {}
    program.unlink()
    assert facts.under_load(run) == {}
    assert facts.read_load("1755, [N/A]") == {}


def test_the_command_holds_no_folders_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--data", "/home/me/text", "--config=/home/me/more.json", "--precision", "bf16"]
    script = facts.ROOT / "benchmarks/learning.py"
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    command = "python benchmarks/learning.py --data text --config=more.json --precision bf16"
    options = argparse.Namespace(data=[Path("/home/me/text")], json=Path("x"), steps=3)
    header = facts.header("cpu", options, "tokenizers")
    assert header["command"] == command
    assert header["options"] == {"data": "['text']", "steps": "3"}
    assert {"torch", "tokenizers"} <= set(header["versions"])


def test_a_row_that_failed_has_its_error_behind_its_labels() -> None:
    rows = [{"case": "a", "ms": 1.25, "mfu": None}, {"case": "b", "error": "out of memory"}]
    columns = {"case": "{case}", "ms": "{ms:.1f}", "MFU": "{mfu:.1%}"}
    lines = facts.table(rows, columns).splitlines()
    assert lines[2:] == ["| a | 1.2 |  |", "| b | out of memory |  |"]


def test_a_case_that_fails_is_a_row_and_the_next_one_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "rows.json"
    rows = Rows("cpu", argparse.Namespace(json=file))
    with rows.case(case="a"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")
    with rows.case(case="b"):
        rows.append({"case": "b", "attention": "torch"})
    written = json.loads(file.read_text())
    assert (
        written["rows"]
        == rows
        == [
            {"case": "a", "error": "out of memory: CUDA out of memory"},
            {"case": "b", "attention": "torch"},
        ]
    )
    with pytest.raises(SystemExit) as ended:
        rows.end("a table")
    assert not ended.value.code
    with rows.case(case="c"):
        raise RuntimeError("a kernel")
    with pytest.raises(SystemExit) as ended:
        rows.end("a table")
    assert ended.value.code
    said = capsys.readouterr().out
    assert "b: attention: torch" in said and "c: RuntimeError: a kernel" in said
