"""What of the GPU benchmarks needs no GPU."""

import importlib.util
import math
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

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
    # With a child that would live on.
    sleep = "import time; time.sleep(600)"
    hangs = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}])"
    begin = time.monotonic()
    hung = gpu.run(gpu.Part("hung", ["-c", hangs], 60), tmp_path, 1.0)
    assert hung.status == "ended at its limit of 1 s"
    assert time.monotonic() - begin < 30


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
