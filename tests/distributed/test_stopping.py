"""Runs that are told to stop, or lose a rank: they go on as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from pretrain.checkpoint import load_weights
from pretrain.launch import STOPPED
from pretrain.run_folder import checkpoints
from tests.data_sets import write_data_set
from tests.distributed.test_training import (
    OPTIONS,
    STEPS,
    TIMEOUT_S,
    command,
    losses,
    metrics,
    tensor_parallel,
    train,
)

Disturb = Callable[[psutil.Process, list[psutil.Process]], None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("data") / "data", vocab_size=400)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(data, run, *tensor_parallel(2))
    return run


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


@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGTERM, "the launcher"),
        (signal.SIGUSR1, "one rank"),
        (signal.SIGUSR2, "the process group"),
        (signal.SIGTERM, "the process group"),
    ],
)
def test_a_signal_stops_a_run_with_nothing_lost(
    number: int, to: str, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    step = random.Random(to).choice([6, 7, 8, 11, 12])  # no step that saves anyway

    def disturb(launcher: psutil.Process, ranks: list[psutil.Process]) -> None:
        if to == "the launcher":
            launcher.send_signal(number)
        elif to == "one rank":
            ranks[-1].send_signal(number)
        else:  # the launcher passes on to the ranks what they get themselves
            os.killpg(launcher.pid, number)

    arguments = command(data, run, *tensor_parallel(2))
    status, output = run_disturbed(arguments, run, step, disturb)
    assert status == STOPPED, output
    assert "Traceback" not in output
    (end,) = metrics(run, "end")
    assert end["reason"] == f"signal {signal.Signals(number).name}"
    assert end["step"] >= step
    assert checkpoints(run)[-1].name == f"step_{end['step']:08d}"
    assert end["step"] == len(metrics(run, "train"))  # the step under way was its last
    train(data, run, *tensor_parallel(2))
    assert [m["step"] for m in metrics(run, "start")] == [0, end["step"]]
    assert_same(run, undisturbed)


def test_a_killed_rank_is_started_again(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = command(data, run, *tensor_parallel(2))
    status, output = run_disturbed(arguments, run, 7, lambda _, ranks: ranks[1].kill())
    assert status == 0, output
    assert "starting again from step_00000005" in output
    assert [m["step"] for m in metrics(run, "start")] == [0, 5]
    assert_same(run, undisturbed)


def test_torchrun_itself_passes_a_signal_on(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Without our launcher: torchrun's own exit status is 1, the checkpoint is there."""
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = [*OPTIONS.split(), "--data.paths", str(data), "--output-dir", str(run)]
    arguments = [
        *(*torchrun, "--nproc-per-node=2", "--signals-to-handle=SIGTERM,SIGUSR1"),
        *("--module", "pretrain", *options, *tensor_parallel(2)),
    ]
    _, output = run_disturbed(arguments, run, 7, lambda it, _: it.send_signal(signal.SIGUSR1))
    (end,) = metrics(run, "end")
    assert end["reason"] == "signal SIGUSR1", output
    train(data, run, *tensor_parallel(2))
    assert_same(run, undisturbed)


def test_a_second_signal_ends_a_run_at_once(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def twice(launcher: psutil.Process, ranks: list[psutil.Process]) -> None:
        for rank in ranks:
            rank.suspend()  # neither may finish its step meanwhile
        launcher.terminate()
        time.sleep(0.1)
        ranks[0].resume()  # waits in a collective for the other
        time.sleep(1.5)
        launcher.terminate()
        time.sleep(0.1)
        ranks[1].resume()

    status, output = run_disturbed(command(data, run, *tensor_parallel(2)), run, 7, twice)
    assert status == 128 + signal.SIGTERM, output
    assert not metrics(run, "end")
