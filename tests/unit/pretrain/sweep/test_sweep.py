"""A sweep's runs: done one after another, skipped when done, resumed after a kill, stopped, reported."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pretrain import cli
from pretrain.commands.train import train
from pretrain.processes import STOP_SIGNALS, shield_forked_children
from pretrain.run.folder import latest_checkpoint
from pretrain.run.metrics import read_metrics
from pretrain.sweep import in_turn
from pretrain.sweep.checks import CheckedRun, checked_runs, write_plan
from pretrain.sweep.folder import log_file
from pretrain.sweep.in_turn import train_in_turn
from pretrain.sweep.table import seconds_of, table
from tests.ranks import fork_managers
from tests.unit.pretrain.sweep.sweeps import write_sweep

KILLED = "seed-1"


@pytest.fixture(autouse=True)
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are forked from the test's own process, which has imported torch."""
    monkeypatch.setattr(in_turn, "START", "fork")


def quick(argv: list[str]) -> int:
    fork_managers()
    return train(argv)


def killed_after_a_checkpoint(argv: list[str]) -> int:
    """`train`; the first run is killed when it has a checkpoint."""
    run = Path(argv[argv.index("--output-dir") + 1])
    if KILLED in run.name:
        threading.Thread(target=_kill, args=(run,), daemon=True).start()
    return quick(argv)


def _kill(run: Path) -> None:
    while latest_checkpoint(run) is None:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)


def until_stopped(argv: list[str]) -> int:
    """Stands in for a training that saves a checkpoint when it is asked to stop."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    # As StopSignals does: they are blocked in the children of a process that has trained (processes.py).
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    print("training", flush=True)
    end = time.monotonic() + 60
    while not asked and time.monotonic() < end:
        time.sleep(0.01)
    print(f"asked by {asked}", flush=True)
    return 75


def planned(file: Path, folder: Path) -> list[CheckedRun]:
    runs = checked_runs(file, folder)
    write_plan(file, folder)
    return runs


def states(runs: list[CheckedRun]) -> list[str]:
    return [run.state for run in runs]


def test_a_sweep_that_was_killed_goes_on(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "runs"
    file = write_sweep(tmp_path, "save_interval = 4\n[axes]\nseed = [1, 2]\ntokens = [1280]\n")
    runs = planned(file, folder)
    assert states(runs) == ["new", "new"]
    assert train_in_turn(runs, folder, killed_after_a_checkpoint) == 1
    said = capsys.readouterr().out
    assert "[1 of 2] seed-1_tokens-1280: was ended by signal 9" in said
    assert "[2 of 2] seed-2_tokens-1280: loss " in said
    assert "1 of 2 runs failed: seed-1_tokens-1280" in said

    runs = planned(file, folder)
    assert states(runs) == ["begun", "done"]
    assert "2 runs, 1 done; 1.28 k tokens to train in about" in table(runs)
    metrics = folder / runs[1].plan.name / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    assert train_in_turn(runs, folder, quick) == 0
    assert "[1 of 1] seed-1_tokens-1280: loss" in capsys.readouterr().out
    starts = [m["step"] for m in read_metrics(folder / runs[0].plan.name) if m["kind"] == "start"]
    assert starts[-1] in (4, 8)  # a checkpoint that the killed one had saved
    assert metrics.stat().st_mtime_ns == before
    assert states(planned(file, folder)) == ["done", "done"]

    # All are done: the command writes the page alone. `report` of the folder writes the same.
    assert cli.main(["sweep", str(file), "--output-dir", str(folder)]) == 0
    first = capsys.readouterr().out
    assert "2 runs, 2 done" in first and "No law for this sweep: a law has 5 unknowns" in first
    page = folder / "report" / "index.html"
    facts = json.loads((folder / "report" / "scaling.json").read_text())
    assert [run["state"] for run in facts["runs"]] == ["done"] * 2
    assert "seed-2_tokens-1280" in page.read_text()
    page.unlink()
    assert cli.main(["report", str(folder)]) == 0
    assert page.is_file()


def test_a_stop_signal_reaches_the_run_and_ends_the_sweep(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "runs"
    file = write_sweep(tmp_path, "[axes]\nseed = [1, 2]\ntokens = [1280]\n")
    runs = planned(file, folder)
    log = log_file(folder, runs[0].plan.name)

    def stop() -> None:
        while not log.exists() or "training" not in log.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    shield_forked_children()  # as any test that trained in this process has done
    threading.Thread(target=stop).start()
    assert train_in_turn(runs, folder, until_stopped) == 75
    assert "[1 of 2] seed-1_tokens-1280: stopped" in capsys.readouterr().out
    assert f"asked by [{int(signal.SIGTERM)}]" in log.read_text()
    assert not log_file(folder, runs[1].plan.name).exists()


def test_times_are_on_a_line_through_finished_runs() -> None:
    assert seconds_of(5.0, []) is None
    assert seconds_of(20.0, [(10.0, 3.0)]) == 6.0
    samples = [(10.0, 3.0), (20.0, 4.0), (20.0, 6.0), (40.0, 9.0)]
    assert seconds_of(15.0, samples) == 4.0
    assert seconds_of(60.0, samples) == 13.0
    assert seconds_of(1.0, samples) == 3.0
