"""What a run does about bad losses, hangs and slow ranks, with faults made in a rank of the test."""

import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch

from pretrain.report.report import write_report
from pretrain.run.checkpoint import load_weights
from pretrain.run.status import read_starts, read_status
from tests.data_sets import write_data_set
from tests.faults import (
    Fault,
    compute_slowly,
    die,
    hang,
    hang_with_python_s_lock,
    losses_times,
    read_slowly,
    train_with,
)

STEPS = 8
NAN = losses_times(math.nan)
DROPOUT = ("--model.hidden-dropout", "0.1", "--model.attention-dropout", "0.1")
LAYOUTS = {
    "tp2": ("--parallel.tensor-model-parallel-size", "2"),
    "pp2": ("--parallel.pipeline-model-parallel-size", "2"),
    "dp2": (),
    "cp2": ("--parallel.context-parallel-size", "2"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("data") / "data", vocab_size=400)


class Run:
    """A run's folder, trained by two ranks unless told otherwise."""

    def __init__(self, path: Path, data: Path, *options: str, ranks: int = 2) -> None:
        self.path = path
        steps = f"--preset debug --schedule.train-steps {STEPS} --save-interval 3 --eval-interval 0"
        self.argv = [*steps.split(), "--data.paths", str(data), "--output-dir", str(path), *options]
        self.argv += ["--micro-batch-size", "2", "--no-tensorboard", "--nproc-per-node", str(ranks)]
        self.output = ""

    def train(
        self, fault: Fault | None = None, *, rank: int = 1, steps: tuple[int, ...] = ()
    ) -> list[int | None]:
        """The ranks' exit statuses."""
        log = self.path.with_name(f"{self.path.name}.log")
        codes, self.output = train_with(fault or die, self.argv, log, rank=rank, steps=steps)
        return codes

    def lines(self, kind: str) -> list[dict]:
        lines = (self.path / "metrics.jsonl").read_text().splitlines()
        return [m for m in map(json.loads, lines) if m["kind"] == kind]

    def steps(self) -> list[int]:
        return [m["step"] for m in self.lines("train")]

    def losses(self) -> list[float]:
        return [m["loss"] for m in self.lines("train")]

    def bad_step(self, step: int) -> dict:
        return json.loads((self.path / f"bad_steps/step_{step}.json").read_text())

    def weights(self) -> dict[str, torch.Tensor]:
        return load_weights(self.path / f"checkpoints/step_{STEPS:08d}")


def assert_same(a: Run, b: Run) -> None:
    assert a.steps() == b.steps()
    assert a.losses() == b.losses()
    expected, got = a.weights(), b.weights()
    assert set(got) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name


@pytest.mark.parametrize(
    ("layout", "policy"),
    [
        ("dp2", "rollback"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("dp2", "skip"),
                ("tp2", "skip"),
                ("tp2", "rollback"),
                ("pp2", "skip"),
                ("pp2", "rollback"),
                ("cp2", "skip"),
                ("cp2", "rollback"),
            )
        ),
    ],
)
def test_a_bad_step_is_passed_over_and_resumed_runs_do_the_same(
    layout: str, policy: str, data: Path, tmp_path: Path
) -> None:
    """One rank's loss is NaN at step 5; once it goes on, once it dies at step 6 and begins again
    without the fault. A third run never had it: it is told to pass the steps over. All drop the same
    activations.
    """
    options = (*LAYOUTS[layout], *DROPOUT, "--faults.not-finite", policy)
    over = {"skip": [5, 5], "rollback": [4, 5]}[policy]
    whole = Run(tmp_path / "whole", data, *options)
    assert whole.train(NAN, rank=1, steps=(5,)) == [0, 0], whole.output
    kept = [s for s in range(1, STEPS + 1) if not over[0] <= s <= over[1]]
    assert whole.steps() == kept
    assert all(w.isfinite().all() for w in whole.weights().values())
    (line,) = whole.lines("bad_step")
    assert (line["step"], line["action"], line["passed_over"]) == (5, policy, over)

    killed = Run(tmp_path / "killed", data, *options)

    def nan_then_death() -> None:
        (NAN if not (killed.path / "bad_steps").exists() else die)()

    assert killed.train(nan_then_death, rank=1, steps=(5, 6)) != [0, 0]
    assert killed.train() == [0, 0], killed.output
    assert killed.lines("start")[-1]["step"] == 3
    assert len(killed.lines("bad_step")) == 1
    assert_same(whole, killed)

    told = Run(tmp_path / "told", data, *options)
    shutil.copytree(whole.path / "bad_steps", told.path / "bad_steps")
    shutil.copy(whole.path / "config.json", told.path)
    assert told.train() == [0, 0], told.output
    assert_same(whole, told)


def test_a_bad_step_is_written_down_and_stops_the_run(data: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", data)
    assert run.train(NAN, rank=1, steps=(5,)) == [2, 2], run.output
    assert "the loss is nan at step 5" in run.output
    status = read_status(run.path)
    assert status is not None
    assert (status["state"], status["step"], status["last_checkpoint"]) == ("failed", 4, 3)
    assert "the loss is nan at step 5" in status["reason"]
    bad = run.bad_step(5)
    assert (bad["loss"], bad["action"], bad["passed_over"]) == ("nan", "stop", None)
    assert bad["samples"] == [32, 40]
    # Data-parallel rank 1 reads every second micro-batch of two.
    losses = [(m["samples"], m["loss"]) for m in bad["micro_batches"]]
    assert [samples for samples, _ in losses] == [[32, 34], [34, 36], [36, 38], [38, 40]]
    assert [loss == "nan" for _, loss in losses] == [False, True, False, True]
    assert set(bad["not_finite_gradients"]) == {"0", "1"}
    assert "torch" in bad["versions"]
    # The checkpoint before is as it was; without the fault the run goes on.
    assert run.train() == [0, 0]
    assert run.steps() == list(range(1, STEPS + 1))


def test_too_many_bad_steps_stop_the_run(data: Path, tmp_path: Path) -> None:
    # Step 2 is skipped: there is no checkpoint yet to go back to.
    options = ("--faults.not-finite", "rollback", "--faults.max-bad-steps", "2")
    run = Run(tmp_path / "run", data, *options, ranks=1)
    assert run.train(NAN, rank=0, steps=(2, 4, 6, 7)) == [2]
    assert run.steps() == [1, 3, 5]
    assert [m["action"] for m in run.lines("bad_step")] == ["skip", "rollback"]
    assert "2 bad steps were passed over before" in run.output


def test_a_spike_that_one_rank_sees_is_one_to_all(data: Path, tmp_path: Path) -> None:
    """At TP 2 each rank computes the loss: only one's is wrong."""
    options = (*LAYOUTS["tp2"], "--schedule.train-steps", "13", "--faults.spike-factor", "3")
    run = Run(tmp_path / "run", data, *options)
    assert run.train(losses_times(50.0), rank=1, steps=(2, 12)) == [0, 0]
    # Step 2's is not known to be one: there is too little to compare it with.
    assert run.steps() == [*range(1, 10), 13]
    (line,) = run.lines("bad_step")
    assert line["action"] == "rollback" and line["passed_over"] == [10, 12]
    assert "the median" in line["reason"]


def test_a_hang_ends_all_ranks_with_their_stacks(data: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", data, "--faults.hang-s", "6")
    started = time.monotonic()
    assert run.train(hang, rank=1, steps=(5,)) == [1, 1], run.output
    assert time.monotonic() - started < 100  # not the end of the test's patience
    stacks = {p.name: p.read_text() for p in (run.path / "hangs").iterdir()}
    assert set(stacks) == {"step_5.rank_0.txt", "step_5.rank_1.txt"}
    assert "in hang" in stacks["step_5.rank_1.txt"]
    assert "in hang" not in stacks["step_5.rank_0.txt"]
    assert "in train_step" in stacks["step_5.rank_0.txt"]
    status = read_status(run.path)
    assert status is not None and status["state"] == "failed"
    assert "no sign of step 5" in status["reason"]
    # Whoever launched it starts it again.
    assert run.train() == [0, 0]
    starts = [line for line in read_starts(run.path) if line["kind"] == "start"]
    assert starts[1]["before"]["state"] == "failed"
    page = write_report([run.path]).read_text()
    assert "finished, 1 restart" in page and "no sign of step 5" in page


@pytest.mark.slow
def test_a_rank_that_keeps_python_s_lock_ends_too(data: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", data, "--faults.hang-s", "6", ranks=1)
    assert run.train(hang_with_python_s_lock, rank=0, steps=(3,)) == [1]
    assert "hang_with_python_s_lock" in run.output


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (compute_slowly, "computing"),
        pytest.param(read_slowly, "reading data", marks=pytest.mark.slow),
    ],
)
def test_the_rank_that_holds_up_the_others_is_named(
    fault, what: str, data: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", data, "--faults.straggler-interval", "4")
    assert run.train(fault, rank=1, steps=(1,)) == [0, 0], run.output
    named = {(m["rank"], m["what"]) for m in run.lines("slow_rank")}
    assert (1, what) in named
    assert (0, what) not in named
    assert f"slow at {what}: rank 1" in write_report([run.path]).read_text()
