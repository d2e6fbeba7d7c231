import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from megatron_ladder.errors import UserError
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


FULL = """
import logging, sys
from pathlib import Path
from pretrain.run.metrics import MetricsLog
log = MetricsLog(
    Path(sys.argv[1]), resume_step=0, train_steps=3, tensorboard=False, wandb=False, config={}
)
log.note("first", "too much" * 10_000)
logging.warning("too much")
log.note("second", "too much")
assert log.has_reader
log.end(step=2, reason="finished")
"""


def test_a_full_disk_under_the_printed_lines_ends_nothing(tmp_path: Path) -> None:
    """Of `train > log 2>&1`. Nor does it change the exit status, when Python writes what is left."""
    buffered = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", FULL, str(tmp_path)]
        done = subprocess.run(command, stdout=full, stderr=full, env=buffered, timeout=60)
    assert done.returncode == 0
    assert [m["kind"] for m in read_metrics(tmp_path)] == ["first", "second", "end"]


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


class Wandb:
    """In place of its package: what is logged, with the step where one is given."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int | None]] = []
        self.begun: list[dict[str, Any]] = []

    def init(self, **options: Any) -> "Wandb":
        self.begun.append(options)
        return self

    def define_metric(self, names: str, *, step_metric: str) -> None:
        assert (names, step_metric) == ("evaluation/*", "evaluation/step")

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        pass


def test_an_evaluation_is_of_an_earlier_step(tmp_path: Path, monkeypatch) -> None:
    """W&B leaves out figures whose step is before the last one: they have an axis of their own."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    options: dict[str, Any] = {"train_steps": 20, "tensorboard": True, "config": {}}
    log = MetricsLog(tmp_path, resume_step=0, wandb=True, **options)
    values = {"tokens": 1, "time": 1.0, "dataset": "d", "loss": 2.0, "perplexity": 7.4}
    log.validation(step=12, **values)
    facts = {"tokens": 5, "seconds": 3.0, "file": "evaluations/a.json", "results": []}
    log.beside_training("evaluation", "measured", step=10, scalars={"toy/acc": 0.5}, **facts)
    log.beside_training("export", "exported", step=10, scalars={}, folder="exports/a")
    log.end(step=12, reason="signal SIGTERM")
    assert wandb.logged == [
        ({"validation/d": 2.0}, 12),
        ({"evaluation/toy/acc": 0.5, "evaluation/step": 10}, None),
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("evaluation/toy/acc")] == [(10, 0.5)]
    lines = [line for line in read_metrics(tmp_path) if line["step"] == 10]
    assert lines[0] == {"kind": "evaluation", "step": 10, **facts}
    again = MetricsLog(tmp_path, resume_step=10, wandb=False, **options)
    assert [line["kind"] for line in again.beside] == ["evaluation", "export"]
    earlier = MetricsLog(tmp_path, resume_step=9, wandb=False, **options)
    assert earlier.beside == []


def test_each_start_is_the_same_run_at_wandb(tmp_path: Path, monkeypatch) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]

    def start(run: Path) -> None:
        run.mkdir(exist_ok=True)
        MetricsLog(run, resume_step=0, train_steps=3, tensorboard=False, wandb=True, config={}).end(
            step=3, reason="finished"
        )

    for name in ("a", "a", "b"):
        start(tmp_path / name)
    first, again, other = wandb.begun
    assert first == again
    assert (first["name"], first["resume"]) == ("a", "allow")
    assert first["id"] == json.loads((tmp_path / "a/wandb.json").read_text())["id"] != other["id"]
    for content in ("{}", '{"id": "../../x"}', '{"id": 3}'):
        (tmp_path / "a/wandb.json").write_text(content)
        with pytest.raises(UserError, match=r"wandb\.json holds no id of a run at W&B: delete it"):
            start(tmp_path / "a")


def test_the_line_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(
        tmp_path, resume_step=0, train_steps=10, tensorboard=False, wandb=False, config={}
    )
    figures = {"learning_rate": 1e-3, "tokens_per_second": 9.0, "tflops_per_gpu": 0.1, "mfu": None}
    step = {"step": 1, "tokens": 9, "time": 4.0, "loss": 5.0, "z_loss": 0.0123, "grad_norm": 1.0}
    log.train(eta_s=4000.0, memory_gib=1.0, **step, **figures)
    log.end(step=1, reason="finished")
    (line,) = capsys.readouterr().out.splitlines()
    assert "loss 5.0000 | z-loss 0.012 | grad norm" in line
    assert line.endswith("ETA 1h06m")
    assert "eta_s" not in (tmp_path / "metrics.jsonl").read_text()
