"""What of the GPU benchmarks needs no GPU."""

import contextlib
import gc
import importlib.util
import math
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch

from megatron_ladder.collectives import take_part
from pretrain.bench import interleaved

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_every_part_is_a_script_that_is_there() -> None:
    parts = script("gpu").parts()
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        first = part.command[0]
        assert first == "-m" or (ROOT / first).exists()
        assert 0 < part.limit_s <= 600


def test_a_part_that_fails_or_hangs_is_said_and_ends(tmp_path: Path) -> None:
    gpu = script("gpu")
    done = gpu.run(gpu.Part("done", ["-c", "print('OUTPUT')"], 60), tmp_path, 60)
    assert done.status == "done"
    assert (tmp_path / "done.log").read_text().strip() == str(tmp_path)
    failed = gpu.run(gpu.Part("failed", ["-c", "raise SystemExit(3)"], 60), tmp_path, 60)
    assert failed.status == "failed with 3"
    # With a child that would live on; what it says when it is interrupted is kept, as pytest's report is.
    sleep = "import time; time.sleep(600)"
    hangs = f"""
import subprocess, sys
try:
    subprocess.run([sys.executable, "-c", {sleep!r}], start_new_session=False)
finally:
    print("so far")
"""
    begin = time.monotonic()
    hung = gpu.run(gpu.Part("hung", ["-c", hangs], 60), tmp_path, 5.0)
    assert hung.status == "ended at its limit of 5 s"
    assert time.monotonic() - begin < 60
    assert "so far" in (tmp_path / "hung.log").read_text()


def test_repetitions_do_not_look_for_garbage_in_all_that_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interleaved, "slowest", lambda times: times)
    monkeypatch.setattr(interleaved.dist, "get_rank", lambda: 1)
    frozen: list[int] = []

    def run() -> tuple[float]:
        frozen.append(gc.get_freeze_count())
        return (0.0,)

    assert interleaved.measure({"run": run}, 2) == {"run": [(0.0,), (0.0,)]}
    assert min(frozen) > 1000
    assert gc.get_freeze_count() == 0


def test_a_late_start_is_late_in_transformer_engines_layers_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overlap = script("overlap")
    backend: Any = ModuleType("megatron_ladder.te.backend")
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    monkeypatch.setattr(overlap, "over", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(overlap.parallel_state, "get_tensor_model_parallel_group", lambda: None)
    monkeypatch.setattr(overlap.linear, "collectives_of", overlap.collectives_of)
    monkeypatch.setattr(overlap.backward_order, "enabled", True)
    marked = take_part(torch.ones(1), cast(Any, "collectives"))

    class Decoder:
        def step(self) -> list[object]:
            return [module.collectives_of(marked) for module in (overlap.linear, backend)]

    line = overlap.Line("ladder", Decoder())
    assert line.step(0.0) == ["collectives"] * 2
    line.early = False
    assert line.step(0.0) == [None] * 2


def test_curves_are_compared_smoothed_and_after_the_start() -> None:
    precision = script("precision")
    reference = [2.0] * 100
    noisy = [2.0 + 0.5 * (-1) ** i for i in range(100)]
    noisy[:30] = [9.0] * 30
    assert precision.smoothed([1.0, 3.0]) == [1.0, 2.0]
    assert precision.largest_difference(noisy, reference) == pytest.approx(0, abs=1e-9)
    higher = [2.02] * 100
    assert precision.largest_difference(higher, reference) == pytest.approx(0.01)
    assert math.isnan(precision.largest_difference([1.0], [1.0]))


def test_cases_of_training_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = script("training_step")
    argv = ["training_step.py", "--cases", "paper-1b:tensorwise:standard:8:full"]
    monkeypatch.setattr(sys, "argv", argv)
    args = steps.arguments()
    config = steps.config_of(args.cases[0], args)
    assert config.fp8.recipe == "tensorwise"
    assert config.precision == "bf16"
    assert (config.model.num_layers, config.model.residual) == (8, "standard")
    assert config.recompute == "full"
    assert config.num_microbatches(1) == args.accumulate
