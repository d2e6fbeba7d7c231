import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pretrain.run.metrics import MetricsLog, has_finished, read_metrics


def test_lines_wait_for_a_disk_that_takes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(
        tmp_path, resume_step=0, train_steps=3, tensorboard=False, wandb=False, config={}
    )
    log.save_failed(step=1, reason="first")
    log.wait()
    size = (tmp_path / "metrics.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))  # the file is full soon
    try:
        for step in range(2, 200):
            log.save_failed(step=step, reason="x" * 100)
        log.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "its lines are kept: [Errno 27] File too large" in capsys.readouterr().err
    assert len(read_metrics(tmp_path)) == 1
    log.end(step=200, reason="finished")
    assert [m["step"] for m in read_metrics(tmp_path)] == list(range(1, 201))


UNREAD = """
import os, sys
from pathlib import Path
from pretrain.run.metrics import MetricsLog
log = MetricsLog(
    Path(sys.argv[1]), resume_step=0, train_steps=3, tensorboard=False, wandb=False, config={}
)
read, write = os.pipe()
os.dup2(write, 1)
log.note("first", "read")
os.close(read)
assert log.has_reader
log.note("second", "not read")
assert not log.has_reader
log.note("third", "not read either")
"""


def test_lines_that_nobody_reads_are_recorded_all_the_same(tmp_path: Path) -> None:
    """And raise no signal: one that has come before would be followed by a second, which kills."""
    done = subprocess.run(
        [sys.executable, "-c", UNREAD, str(tmp_path)], stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [m["kind"] for m in read_metrics(tmp_path)] == ["first", "second", "third"]


def test_a_slow_disk_holds_up_no_step(tmp_path: Path) -> None:
    """And a killed run's lines, `end` or not, are those up to its last complete checkpoint: `wait`."""
    log = MetricsLog(
        tmp_path, resume_step=0, train_steps=3, tensorboard=False, wandb=False, config={}
    )
    write, free = log._append, threading.Event()
    log._append = lambda line: (free.wait(), write(line))  # type: ignore[method-assign]
    for step in range(1, 50):
        log.save_failed(step=step, reason="of two\nlines")
    assert read_metrics(tmp_path) == []
    free.set()
    log.wait()
    assert [m["step"] for m in read_metrics(tmp_path)] == list(range(1, 50))


def test_what_was_validated_and_finished(tmp_path: Path) -> None:
    def resumed(step: int) -> MetricsLog:
        return MetricsLog(
            tmp_path, resume_step=step, train_steps=20, tensorboard=False, wandb=False, config={}
        )

    assert not has_finished(tmp_path, 20)  # it has no metrics yet
    log = resumed(0)
    log.baseline(dataset="a", unigram_loss=6.0)
    for step in (10, 20):
        log.validation(step=step, tokens=1, time=1.0, dataset="a", loss=2.0, perplexity=7.4)
    log.end(step=20, reason="signal SIGTERM")
    assert not has_finished(tmp_path, 20)
    assert resumed(20).validated(20) == ["a"]
    log = resumed(10)
    assert log.validated(10) == ["a"] and log.validated(20) == []
    log.baseline(dataset="a", unigram_loss=6.0)  # it is recorded already
    log.end(step=20, reason="finished")
    assert has_finished(tmp_path, 20) and not has_finished(tmp_path, 30)
    assert [m["kind"] for m in read_metrics(tmp_path)] == ["baseline", "validation", "end"]
