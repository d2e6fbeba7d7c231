"""Runs that are told to stop, or lose a rank: they go on as if nothing had happened."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pretrain.run.folder import checkpoints
from pretrain.start.launch import STOPPED
from tests.data_sets import write_data_set
from tests.distributed.disturbed import assert_same, run_disturbed
from tests.distributed.test_training import (
    OPTIONS,
    command,
    metrics,
    tensor_parallel,
    train,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("data") / "data", vocab_size=400)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(data, run, *tensor_parallel(2))
    return run


@pytest.mark.parametrize(
    ("number", "to"),
    [
        pytest.param(signal.SIGTERM, "the launcher", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, "one rank", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR2, "the process group", marks=pytest.mark.slow),
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


VALIDATION_IS_TOLD = """
import os, signal, sys
from pretrain import cli
from pretrain.loop import train
validate = train.validate
def told(*given):
    os.kill(os.getpid(), signal.SIGTERM)
    return validate(*given)
train.validate = told
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_signal_while_validating_costs_no_other_step(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = command(data, run, "--nproc-per-node", "1", "--eval-interval", "3")[3:]
    script = [sys.executable, "-c", VALIDATION_IS_TOLD, *arguments]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert done.returncode == STOPPED, done.stdout + done.stderr
    assert [m["step"] for m in metrics(run, "train")] == [1, 2, 3]
    assert [m["step"] for m in metrics(run, "end")] == [3]
    assert [c.name for c in checkpoints(run)] == ["step_00000003"]


@pytest.mark.slow  # tests/chaos does it in each run
def test_a_killed_rank_is_started_again(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def kill(_: psutil.Process, ranks: list[psutil.Process]) -> None:
        while not checkpoints(run):  # being written
            time.sleep(0.01)
        ranks[1].kill()

    status, output = run_disturbed(command(data, run, *tensor_parallel(2)), run, 6, kill)
    assert status == 0, output
    assert re.search("ranks ended with exit status .*-9.*: starting again from step_000000", output)
    assert metrics(run, "start")[-1]["step"] in (5, 10, 15)
    assert_same(run, undisturbed)


@pytest.mark.slow
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


@pytest.mark.slow
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
