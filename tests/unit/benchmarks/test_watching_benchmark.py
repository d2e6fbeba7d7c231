"""benchmarks/commands/watching.py: whose processor time is whose, and the cost of a pair of runs."""

import os
import subprocess
import sys
import time

import pytest

from commands import watching


def test_costs_are_those_of_pairs() -> None:
    rounds = {
        "without": [{"steps": 100.0}, {"steps": 200.0}],
        "with": [{"steps": 101.0}, {"steps": 210.0}],
    }
    assert watching.costs(rounds, "steps") == pytest.approx([0.01, 0.05])


def test_what_measures_is_told_from_what_trains() -> None:
    python = "/usr/bin/python"
    assert watching.is_beside([python, "-m", "pretrain.watch.child", "1", "19", python])
    assert watching.is_beside([python, "-m", "pretrain.cli", "eval", "run/checkpoints/step_1"])
    for training in (
        "pretrain.cli train --preset tiny --eval-interval 3",
        "pretrain --preset tiny",
    ):
        assert not watching.is_beside([python, "-m", *training.split()])


def test_processor_times() -> None:
    busy = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass\ninput()"
    code = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], 'eval'])\n"
        + busy
    )
    training = subprocess.Popen([sys.executable, "-c", code, busy], stdin=subprocess.PIPE)
    processors = watching.Processors(training.pid)
    deadline = time.monotonic() + 60
    while processors.so_far()["beside_cpu"] < 0.4:
        processors.look()
        assert time.monotonic() < deadline
    assert training.stdin is not None
    training.stdin.write(b"\n")
    training.stdin.flush()
    while processors.so_far()["ranks_cpu"] < 0.4:
        processors.look()
        assert time.monotonic() < deadline
    training.kill()
    training.wait()
    found = processors.so_far()
    assert 0.4 <= found["beside_cpu"] < 2
    assert 0.4 <= found["ranks_cpu"] < 2
    assert os.getpid() not in processors._seconds
