"""What is said of jobs, and how they are cancelled; with programs in place of SLURM's."""

import json
import time
from pathlib import Path

import pytest

from slurm.jobs.folders import log_files
from slurm.watch.history import read_history
from tests.unit.slurm.conftest import TOKENIZE, TRAIN, FakeSlurm, run

STATUS = {
    "state": "training", "step": 1200, "train_steps": 25000, "tokens": 1, "loss": 2.31,
    "tokens_per_second": 1.2e6, "eta_s": 12000.0, "last_checkpoint": 1000, "starts": 3, "reason": "",
    "unix_time": 1.0, "host": "n", "pid": 1, "world_size": 2, "job_id": "101",
}  # fmt: skip


def test_status_of_a_run(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    run_dir = tmp_path / "run"
    run(capsys, "submit", "--profile", "p.toml", "--after", "7", *TRAIN)
    (run_dir / "status.json").write_text(json.dumps(STATUS))
    (slurm.folder / "SQUEUE").write_text(
        "101|RUNNING|None|1:02|1:00:00|node[0-1]\n9|RUNNING|||||\n"
    )
    text = run(capsys, "status", "run")
    for part in (
        f"{run_dir}: training, step 1,200 of 25,000 (4.8%), loss 2.3100",
        "1,200,000 tokens/s, 3 h 20 min to go",
        "last checkpoint: step 1,000; restarts: 2",
        "train, job 101",
        "RUNNING on node[0-1], 1:02 of 1:00:00",
    ):
        assert part in text
    starting = {**STATUS, "state": "starting", "phase": "index files: 3 of 9 parts"}
    (run_dir / "status.json").write_text(json.dumps(starting))
    assert "starting (index files: 3 of 9 parts), step 1,200" in run(capsys, "status", "run")
    (run_dir / "status.json").write_text(json.dumps(STATUS))
    (run_dir / "status.json").write_text(
        json.dumps({**STATUS, "state": "measuring", "watch": "evaluation of step 1000"})
    )
    text = run(capsys, "status", "run")
    assert "measuring, step 1,200" in text
    assert "tokens/s" not in text and "to go" not in text
    assert "loss 2.3100; beside it: evaluation of step 1000\n" in text
    (run_dir / "status.json").write_text(json.dumps(STATUS))
    # Killed: it could not say so.
    (slurm.folder / "SQUEUE").write_text("101|NODE_FAIL|NodeDown|1:02|1:00:00|node[0-1]\n")
    text = run(capsys, "status", "run")
    assert "not running; when last heard of: training, step 1,200" in text
    assert "NODE_FAIL, a node went down" in text
    (slurm.folder / "SQUEUE").write_text("")
    assert "forgotten by SLURM: it is over" in run(capsys, "status", "run")
    (slurm.folder / "SQUEUE").unlink()  # squeue fails: another machine, or SLURM is down
    assert "SLURM cannot be asked here" in run(capsys, "status", "run")
    (run_dir / "status.json").write_text(
        json.dumps({**STATUS, "state": "failed", "reason": "no space"})
    )
    assert "why it stopped: no space" in run(capsys, "status", "run")
    (run_dir / "status.json").write_text(
        json.dumps({**STATUS, "state": "failed", "reason": "CUDA error\nFor \x1b[2J debugging"})
    )
    assert "why it stopped: CUDA error For ?[2J debugging;" in run(capsys, "status", "run")
    (run_dir / "status.json").write_text("{")
    assert "train, job 101" in run(capsys, "status", "run")


def test_a_job_that_squeue_does_not_list(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    """A colleague's: squeue lists one's own, and without accounts sacct knows none."""
    run(capsys, "submit", "--profile", "p.toml", "--after", "7", *TRAIN)
    (slurm.folder / "SQUEUE").write_text("")
    file = tmp_path / "run" / "status.json"
    file.write_text(json.dumps({**STATUS, "unix_time": time.time() - 1}))
    text = run(capsys, "status", "run")
    assert f"{tmp_path / 'run'}: training, step 1,200 of 25,000" in text
    assert "unknown: SLURM does not list it among your jobs" in text and "over" not in text
    for old in ({"unix_time": time.time() - 600}, {"unix_time": time.time(), "state": "finished"}):
        file.write_text(json.dumps({**STATUS, **old}))
        text = run(capsys, "status", "run")
        assert "forgotten by SLURM: it is over" in text
    assert "finished, step 1,200" in text


def test_status_of_what_never_runs_and_of_arrays(slurm: FakeSlurm, capsys) -> None:
    chain = [*TOKENIZE, "--tasks", "3", "then", *TRAIN]
    run(capsys, "submit", "--profile", "p.toml", *chain)
    lines = ["101|COMPLETED|||||"] * 2 + ["101|FAILED|NonZeroExitCode||||"]
    lines += [f"{i}|PENDING|DependencyNeverSatisfied||||" for i in (102, 103)]
    (slurm.folder / "SQUEUE").write_text("\n".join(lines) + "\n")
    text = run(capsys, "status", "tokens", "run", "nothing")
    assert "data tokenize, job 101" in text
    assert "2 COMPLETED, 1 FAILED" in text
    assert text.count("never ran: a job it waited for failed") == 2
    assert "nothing: does not exist" in text


def test_cancel(slurm: FakeSlurm, capsys) -> None:
    assert "nothing was submitted" in run(capsys, "cancel", "run", status=2)
    run(capsys, "submit", "--profile", "p.toml", "--after", "7", *TRAIN)
    squeue = slurm.folder / "SQUEUE"
    for state, argv, call in (
        ("RUNNING", ["run"], ["--batch", "--signal=USR2", "101"]),
        ("RUNNING", ["run", "--now"], ["101"]),
        ("PENDING", ["run"], ["101"]),
    ):
        squeue.write_text(f"101|{state}|||||\n")
        run(capsys, "cancel", *argv)
        assert slurm.calls("scancel")[-1] == call
    squeue.write_text("101|COMPLETED|||||\n")
    assert "no job is queued or runs" in run(capsys, "cancel", "run")


def test_logs(slurm: FakeSlurm, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.watch.logs.ASK_S", 0.5)
    run(capsys, "submit", "--profile", "p.toml", *TOKENIZE, "--tasks", "11")
    assert "no log yet" in run(capsys, "logs", "tokens")
    folder = tmp_path / "tokens-slurm" / "1"
    for task in (10, 9):
        (folder / f"log.{task}").write_text(f"task {task}\n")
    assert [f.name for f in log_files(folder)] == ["log.9", "log.10"]
    text = run(capsys, "logs", "tokens")
    assert text.index("task 9\n") < text.index("task 10\n")
    (slurm.folder / "SQUEUE").write_text("101|COMPLETED|||||\n")
    long = "".join(f"line {i}\n" for i in range(100))
    (folder / "log.9").write_text(long)
    monkey = run(capsys, "logs", "-f", "tokens")  # ends, as the job is over
    assert "line 99\n" in monkey
    assert "line 79\n" not in monkey


def test_histories_in_words(tmp_path: Path) -> None:
    for lines, last in {
        ("start 1 none on a b",): "",
        (
            "start 1 none on a",
            "end 75 00000012 limit",
        ): "stopped in good order before the time limit",
        ("start 1 none on a", "end 137 none "): "a rank was ended by SIGKILL",
        ("start 1 none on a", "end 1 none"): "a rank ended with status 1",
        ("end 1 none", "stop gave up: 3 restarts"): "gave up: 3 restarts",
        (
            "end 1 none fewer than 2 nodes of the job are left",
        ): "fewer than 2 nodes of the job are left",
        (): "",
    }.items():
        (tmp_path / "history").write_text(
            "".join(f"2026-01-01T00:00:00 {line}\n" for line in lines)
        )
        assert read_history(tmp_path).last == last
