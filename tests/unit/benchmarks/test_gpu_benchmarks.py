"""What of the GPU benchmarks needs no GPU."""

import argparse
import contextlib
import gc
import importlib.util
import json
import math
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import pytest
import torch
from megatron.core import parallel_state

from measuring import standby as standby_module
from measuring.learning.modelled_time import modelled
from measuring.overlap.late import started_late
from megatron_ladder.collectives.points import SubmoduleCollectives
from pretrain.bench import interleaved
from pretrain.start.arguments import parse_train

ROOT = Path(__file__).parents[3]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_every_part_is_a_script_that_is_there() -> None:
    gpu = script("gpu")
    parts = gpu.parts()
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        first = part.command[0]
        assert first == "-m" or (ROOT / first).exists()
        assert 0 < part.limit_s <= 600
    one, *rest = gpu.chosen(["precision", "overlap"])
    assert one.name == "precision" and {part.name.split("-")[0] for part in rest} == {"overlap"}
    queues = [p.environment["CUDA_DEVICE_MAX_CONNECTIONS"] for p in gpu.chosen(["connections"])]
    assert queues == ["1", "2", "8", "32"]
    with pytest.raises(SystemExit, match="no part begins with 'nothing'"):
        gpu.chosen(["nothing"])


def test_every_parts_options_are_its_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash there costs minutes of a GPU."""
    gpu = script("gpu")
    for part in gpu.parts():
        if part.command[0] != "-m":
            words = gpu.words_of(part, Path("results"), part.limit_s)
            assert not {"OUTPUT", "WORK", "SECONDS"} & set(
                " ".join(words).replace("/", " ").split()
            )
            monkeypatch.setattr(sys, "argv", words)
            name = part.command[0].removeprefix("benchmarks/").removesuffix(".py")
            script(name).arguments()


def test_learnings_models_are_of_25_million_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the options that it gives to `train` are those of `train`."""
    learning = script("learning")
    monkeypatch.setattr(learning, "Standby", lambda *_, **__: None)
    gpu = script("gpu")
    for part in gpu.chosen(["learning", "rates"]):
        monkeypatch.setattr(sys, "argv", gpu.words_of(part, Path("results"), part.limit_s))
        options, of_train = learning.arguments()
        options.data = [Path("data")]
        trainings = learning.Trainings(options, of_train)
        command = trainings.command("ladder", 1, Path("run"), options.train_tokens)
        config, _ = parse_train(command)
        assert 25e6 < config.model.num_parameters(embeddings=False) < 26e6
        assert config.precision == "bf16" and config.num_microbatches(1) == 1
        # The trial, which may be all there is time for, is longer than warm-up.
        assert config.steps_for(options.trial_tokens) > config.warmup_steps
        for target in options.target:
            assert set(options.kinds) <= set(modelled(target, options.device).plan)
        assert options.seconds == part.limit_s - 30


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With a folder of its own for scripts, and a standby that imports next to nothing."""
    module = script("gpu")
    standby = Path(standby_module.__file__).read_text()
    begin, end = standby.index("IMPORTED = ("), standby.index("class Standby")
    names = 'IMPORTED = ("json", "no_such_package", "broken")\n\n\n'
    (tmp_path / "standby.py").write_text(standby[:begin] + names + standby[end:])
    (tmp_path / "broken.py").write_text("raise OSError('a library')")
    monkeypatch.setattr(standby_module, "__file__", str(tmp_path / "standby.py"))
    (tmp_path / "output").mkdir()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def part_of(gpu: ModuleType, name: str, source: str, *words: str) -> Any:
    (gpu.ROOT / f"{name}.py").write_text(source)
    return gpu.Part(name, [f"{name}.py", *words], 60, {"QUEUES": "8"})


def run(gpu: ModuleType, part: Any, limit_s: float) -> Any:
    output = gpu.ROOT / "output"
    return gpu.run(part, gpu.standby_of(part, output), output, limit_s)


def log_of(gpu: ModuleType, name: str) -> str:
    return (gpu.ROOT / "output" / f"{name}.log").read_text()


def test_a_part_runs_in_a_process_that_has_imported_before(gpu: ModuleType) -> None:
    says = """
import os, sys
assert __name__ == "__main__" and "json" in sys.modules
print(sys.argv, os.environ["QUEUES"], sys.path[0])
"""
    output = gpu.ROOT / "output"
    part = part_of(gpu, "says", says, "--json", "OUTPUT/a.json")
    done = run(gpu, part, 60)
    assert done.status == "done"
    assert done.command == "QUEUES=8 python says.py --json OUTPUT/a.json"
    argv = ["says.py", "--json", f"{output}/a.json"]
    # What cannot be imported does not keep the part from running.
    first, last = log_of(gpu, "says").splitlines()
    assert first == "standby: broken: OSError: a library"
    assert last == f"{argv} 8 {gpu.ROOT}"
    module = gpu.Part("module", ["-m", "says", "word"], 60, {"QUEUES": "1"})
    assert run(gpu, module, 60).status == "done"
    assert "'word'] 1" in log_of(gpu, "module")


def test_a_part_runs_when_its_standby_has_died(gpu: ModuleType) -> None:
    part = part_of(gpu, "says", "print('here')")
    (gpu.ROOT / "standby.py").write_text("print('no'); raise SystemExit(1)")
    standby = gpu.standby_of(part, gpu.ROOT / "output")
    standby.process.wait()
    assert gpu.run(part, standby, gpu.ROOT / "output", 60).status == "done"
    assert log_of(gpu, "says").split() == ["no", "here"]


def test_a_part_that_fails_or_hangs_is_said_and_ends(gpu: ModuleType) -> None:
    failed = run(gpu, part_of(gpu, "failed", "raise SystemExit(3)"), 60)
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
    hung = run(gpu, part_of(gpu, "hung", hangs), 10.0)
    assert hung.status == "ended at its limit of 10 s"
    assert time.monotonic() - begin < 60
    assert "so far" in log_of(gpu, "hung")


def test_one_call_runs_parts_and_packs_what_they_left(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second fails; a large file and what is not a result stay behind."""
    writes = """
import sys
from pathlib import Path
output = Path(sys.argv[1])
(output / "a.json").write_text("{}")
(output / "a.trace.json.gz").write_text("a trace")
(output / "huge.json").write_bytes(bytes(5 << 20))
(output / "weights.bin").write_text("weights")
"""
    parts = [part_of(gpu, "writes", writes, "OUTPUT"), part_of(gpu, "fails", "raise SystemExit(1)")]
    monkeypatch.setattr(gpu, "parts", lambda: parts)
    output = gpu.ROOT / "output"
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(output), "--seconds", "300"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    summary = json.loads((output / "summary.json").read_text())
    assert [part["status"] for part in summary] == ["done", "failed with 1"]
    with tarfile.open(output / "results.tgz") as tar:
        assert set(tar.getnames()) == {"a.json", "writes.log", "fails.log", "summary.json"}
    with tarfile.open(output / "traces.tgz") as tar:
        assert tar.getnames() == ["a.trace.json.gz"]


def test_importing_leaves_cuda_alone() -> None:
    """CUDA would take the GPU's memory and time, and reads its variables once."""
    asserts = """
import sys
import torch
def refused(*_, **__):
    raise AssertionError("CUDA")
for name in ("_lazy_init", "current_device", "get_device_capability", "get_device_properties"):
    setattr(torch.cuda, name, refused)
sys.path.append("benchmarks")
from measuring import standby
standby.prepare()
assert "pretrain.bench.decoder" in sys.modules and "megatron.core" in sys.modules
"""
    command = [sys.executable, "-W", "ignore", "-c", asserts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CUDA" not in done.stdout


def test_a_shape_without_memory_is_a_row_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = script("layers")
    real = layers.Decoder

    class Decoder(real):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.no_memory = kwargs["precision"] == "bf16"

        def backward(self, output: torch.Tensor) -> None:
            if self.no_memory:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB. GPU 0")
            super().backward(output)

    monkeypatch.setattr(layers, "Decoder", Decoder)
    file = tmp_path / "layers.json"
    options = ["--shapes", "debug", "tiny-experts", "--precisions", "bf16", "fp32"]
    options += ["--tokens", "64"]
    options += ["--steps", "2", "--layers", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["layers.py", *options])
    gc.collect()
    frozen = gc.get_freeze_count()  # Python 3.12 begins with some
    with pytest.raises(SystemExit) as ended:
        layers.main()
    parallel_state.destroy_model_parallel()
    assert not ended.value.code
    assert gc.isenabled() and gc.get_freeze_count() <= frozen
    rows = json.loads(file.read_text())["rows"]
    failed = [row["shape"] for row in rows if "error" in row]
    assert failed == ["debug", "tiny-experts"]
    assert rows[0]["error"] == "out of memory: CUDA out of memory"
    rest = [row for row in rows if "error" not in row]
    assert [row["kind"] for row in rest] == 2 * list(layers.KINDS)
    assert all(row["ms"] > 0 and row["attention"] for row in rest)
    assert "| debug | bf16 | out of memory: CUDA out of memory |" in capsys.readouterr().out


def test_an_overlap_whose_layers_do_not_fit_has_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    overlap = script("overlap")

    def measured(args: argparse.Namespace, *_: Any) -> dict[str, Any]:
        if args.layers > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.")
        return {"layers": args.layers}

    monkeypatch.setattr(overlap, "measured", measured)
    report = overlap.as_many_as_fit(argparse.Namespace(layers=24, fake_tp=8), 8, "a GPU")
    assert report["layers"] == 6
    assert [line.split(":")[0] for line in report["did_not_fit"]] == ["24 layers", "12 layers"]
    with pytest.raises(torch.OutOfMemoryError):  # several ranks would have to agree
        overlap.as_many_as_fit(argparse.Namespace(layers=24, fake_tp=None), 2, "a GPU")


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
    assert gc.get_freeze_count() < min(frozen)


def test_a_late_start_is_where_the_sum_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[torch.Tensor] = []
    monkeypatch.setattr(SubmoduleCollectives, "_sum", lambda _, x: started.append(x) or Arrived(x))
    for late in (False, True):
        started.clear()
        collectives = SubmoduleCollectives(cast(Any, "a group"), sequence_parallel=False)
        gradient = torch.ones(1)
        with started_late() if late else contextlib.nullcontext():
            collectives.start_input_gradient(gradient)
            assert len(started) == (0 if late else 1)
            assert collectives.wait_input_gradient() is gradient
        assert len(started) == 1


class Arrived(NamedTuple):
    result: torch.Tensor

    def arrive(self) -> torch.Tensor:
        return self.result


def test_an_interrupt_keeps_complete_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """gpu.py ends a part at its limit. Several ranks could not agree on what is complete."""
    monkeypatch.setattr(interleaved, "slowest", lambda times: times)
    monkeypatch.setattr(interleaved.dist, "get_rank", lambda: 1)

    def measured(last: int, keep: bool) -> dict[str, list[tuple[float, ...]]]:
        calls = 0

        def run() -> tuple[float]:
            nonlocal calls
            calls += 1
            if calls == last:
                raise KeyboardInterrupt
            return (float(calls),)

        runs: dict[str, Callable[[], tuple[float, ...]]] = {"a": run, "b": run}
        return interleaved.measure(runs, 10, keep_what_is_there=keep)

    found = measured(
        8, keep=True
    )  # in the fourth repetition: the first warms up, and order changes
    assert [len(times) for times in found.values()] == [2, 2]
    for last, keep in ((8, False), (5, True)):
        with pytest.raises(KeyboardInterrupt):
            measured(last, keep)


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
