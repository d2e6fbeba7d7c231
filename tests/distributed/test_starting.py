"""A start that hangs: each rank says in which phase, and ends. One that goes on is left alone."""

import json
import time
from pathlib import Path

import pytest

from pretrain.index.parts import SplitPart
from pretrain.loop import train as training
from pretrain.loop import watchdog
from pretrain.run.status import Status, read_status
from pretrain.start import preflight
from tests.data_sets import write_data_set
from tests.runs import run_train

LIMIT_S = 8
make, update = SplitPart.make, Status.update


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("data") / "data", vocab_size=400)


def start(data: Path, folder: Path, ranks: int = 2) -> tuple[list[int | None], str]:
    options = "--preset debug --schedule.train-steps 4 --eval-interval 0 --no-tensorboard"
    options += f" --micro-batch-size 2 --nproc-per-node {ranks} --faults.start-s {LIMIT_S}"
    argv = [*options.split(), "--data.paths", str(data), "--output-dir", str(folder / "run")]
    return run_train(argv, folder / "log", 120)


def hang(*_: object, **__: object) -> None:
    time.sleep(1000)


def test_index_files_that_hang(data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(SplitPart, "make", hang)  # in a process that rank 0 has started
    monkeypatch.setattr(watchdog, "GRACE_S", 2.0)
    codes, output = start(data, tmp_path)
    assert codes == [1, 1], output
    for rank in (0, 1):
        stacks = (tmp_path / f"run/hangs/start.rank_{rank}.txt").read_text()
        assert "the start hangs at index files: 0 of 2 parts" in stacks
    status = read_status(tmp_path / "run")
    assert status is not None and status["state"] == "failed"
    assert "the start hangs at index files: 0 of 2 parts" in status["reason"]


def slowly(*arguments: object) -> None:
    """Longer than a phase may take, but at work."""
    end = time.monotonic() + 1.5 * LIMIT_S
    while time.monotonic() < end:
        pass
    make(*arguments)


@pytest.mark.slow
def test_index_files_that_take_long(data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(SplitPart, "make", slowly)
    codes, output = start(data, tmp_path)
    assert codes == [0, 0], output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "name", "phase"),
    [
        (preflight, "open_data", "checking the configuration, the data sets and the run's folder"),
        (training, "lock", "taking the run's folder"),
        (training, "start_ranks", "meeting the other ranks"),
        (training, "build", "building the model"),
        (training, "newest_valid", "checking the newest checkpoint"),
        (training, "train_sequences", "opening the data sets"),
        (training, "train_step", "the first step"),
    ],
)
def test_each_phase_is_named(where, name, phase, data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(where, name, hang)
    codes, output = start(data, tmp_path, ranks=1)
    assert codes == [1], output
    stacks = (tmp_path / "run/hangs/start.rank_0.txt").read_text()
    assert f"the start hangs at {phase}: no progress for " in stacks


def test_the_status_has_the_phases(data: Path, tmp_path: Path, monkeypatch) -> None:
    def record(self: Status, state=None, **facts: object) -> None:
        update(self, state, **facts)
        if "phase" in facts:
            self.wait()
            written = json.loads((tmp_path / "run/status.json").read_text())
            with (tmp_path / "phases").open("a") as file:
                file.write(f"{written['state']}: {written['phase']}\n")

    monkeypatch.setattr(Status, "update", record)
    codes, output = start(data, tmp_path, ranks=1)
    assert codes == [0], output
    phases = (tmp_path / "phases").read_text().splitlines()
    assert phases[0] == "starting: joining the other ranks"
    assert phases[-2:] == ["starting: opening the data sets", "training: "]
