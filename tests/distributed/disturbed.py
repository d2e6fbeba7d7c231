"""Runs by the command line that something happens to."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from pretrain.run.checkpoint import load_weights
from tests.distributed.test_training import STEPS, TIMEOUT_S, losses

Disturb = Callable[[psutil.Process, list[psutil.Process]], None]
"""Called with what was started and its ranks."""


def steps_of(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count('"kind": "train"') if file.is_file() else 0


def run_disturbed(arguments: list[str], run: Path, step: int, disturb: Disturb) -> tuple[int, str]:
    """Starts a run and disturbs it after a step.

    Returns:
        The exit status, and what it printed.
    """
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while steps_of(run) < step:
            assert process.poll() is None, "the run ended before it was disturbed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        launcher = psutil.Process(process.pid)
        everything = launcher.children(recursive=True)
        disturb(launcher, launcher.children() or [launcher])
        output, _ = process.communicate(timeout=TIMEOUT_S)
        _, left = psutil.wait_procs(everything, timeout=10)
        assert not left, f"left over: {left}"
        return process.returncode, output
    finally:
        process.kill()


def assert_same(run: Path, undisturbed: Path) -> None:
    assert losses(run) == losses(undisturbed)
    last = f"checkpoints/step_{STEPS:08d}"
    expected, got = load_weights(undisturbed / last), load_weights(run / last)
    assert set(got) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name
