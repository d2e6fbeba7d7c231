"""benchmarks/kinds/experts.py: what a layer can hide at most, and models that the trainer accepts."""

import importlib.util
import json
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from megatron_ladder.config import ParallelConfig, check_layout
from pretrain.config.presets import PRESETS

FILE = Path(__file__).parents[3] / "benchmarks/kinds/experts.py"


SMALL = (
    "--fake-ranks 8 --experts 8 --layers 1 --hidden-size 32 --expert-size 16 --seq-length 16 "
    "--micro-batch-size 1 --link-ms 1"
)


def script(name: str) -> ModuleType:
    file = FILE.parents[1] / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_what_can_be_hidden_and_the_models() -> None:
    benchmark = script("kinds/experts")
    assert benchmark.most(6, shared=True) == 1
    assert benchmark.most(6, shared=False) == pytest.approx(11 / 12)
    sizes = Namespace(
        **{"layers": 2, "hidden_size": 64, "heads": 8, "expert_size": 32, "shared_size": 48},
        **{"seq_length": 16, "experts": 4, "top_k": 2, "fake_ranks": None},
    )
    for residual, shared in benchmark.KINDS.values():
        model = benchmark.model_of(sizes, residual, shared)
        check_layout(model, ParallelConfig(expert_model_parallel_size=benchmark.RANKS))
        assert model.experts.moe_shared_expert_intermediate_size == (48 if shared else None)
        assert (model.residual, model.num_attention_heads) == (residual, 8)
    sizes.shared_size = None
    alike = benchmark.model_of(sizes, "ladder", shared=True).experts
    assert alike.moe_shared_expert_intermediate_size == 32


def test_the_gpus_part_has_the_presets_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark, gpu = script("kinds/experts"), script("gpu")
    (part,) = gpu.chosen(["experts-link"])
    monkeypatch.setattr(sys, "argv", part.command)
    model = benchmark.model_of(benchmark.arguments(), "ladder", shared=True)
    preset = PRESETS["deepseek-v2-lite-mha"]().model
    for name in ("hidden_size", "num_attention_heads", "head_dim"):
        assert getattr(model, name) == getattr(preset, name), name
    for name in (
        *("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size"),
        "moe_shared_expert_intermediate_size",
    ):
        assert getattr(model.experts, name) == getattr(preset.experts, name), name


def test_one_rank_of_eight_is_measured_alone(tmp_path: Path) -> None:
    """As on a GPU, at a hundredth of the size and without one: a crash there costs minutes."""
    file = tmp_path / "experts.json"
    command = [sys.executable, str(FILE), *SMALL.split(), "--steps", "2", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["kind"] for row in rows[::2]] == [
        "standard, shared expert",
        "ladder, shared expert",
        "standard",
        "ladder",
    ]
    # Dispatch and combine, and tokens' weights: a pass of one layer.
    assert all(0.0019 < row["link_s"] < 0.0023 for row in rows)


def test_what_was_complete_at_a_cut_off_is_kept(tmp_path: Path) -> None:
    """gpu.py interrupts a part at its limit."""
    file = tmp_path / "experts.json"
    command = [sys.executable, str(FILE), *SMALL.split(), "--steps", "100000", "--json", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        said = b""
        while b"repetition 4 " not in said and (more := process.stderr.read1()):
            said += more
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, (said + errors).decode()
    assert b"repetitions are kept" in output
    assert len(json.loads(file.read_text())["rows"]) == 8
