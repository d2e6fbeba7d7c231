"""Faults for trainings whose ranks are forked from the test's own process (tests/runs.py)."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.loop import rank_speed, step, watchdog
from pretrain.loop import train as training
from tests.runs import run_train

TIMEOUT_S = 150

Fault = Callable[[], None]


def train_with(
    fault: Fault, argv: list[str], log: Path, *, rank: int, steps: tuple[int, ...]
) -> tuple[list[int | None], str]:
    """Trains with something that goes wrong on one rank, before steps counted from 1 in this start.

    Returns:
        The ranks' exit statuses, and what they printed.
    """
    train_step, masked_sum = training.train_step, step._masked_sum
    taken = 0

    def faulty(*args: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken in steps and int(os.environ.get("RANK", "0")) == rank:
            fault()
        result = train_step(*args)
        step._masked_sum = masked_sum
        return result

    with pytest.MonkeyPatch.context() as patch:  # the ranks are forked with it
        patch.setattr(training, "train_step", faulty)
        return run_train(argv, log, TIMEOUT_S)


def losses_times(factor: float) -> Fault:
    """This rank's losses of one step, and their gradients."""

    def fault() -> None:
        masked_sum = step._masked_sum
        step._masked_sum = lambda config, batch, output: masked_sum(config, batch, output * factor)

    return fault


def hang() -> None:
    time.sleep(1000)


def hang_with_python_s_lock() -> None:
    import ctypes

    watchdog.BACKSTOP_S = 2.0
    time.sleep(2 * watchdog.POLL_S)  # the watchdog's turn
    ctypes.PyDLL(None).sleep(1000)


def die() -> None:
    os._exit(9)


def compute_slowly() -> None:
    """From here on each matrix product takes 2 ms more."""
    matmul = torch.matmul

    def slow(*args: Any, **keywords: Any) -> torch.Tensor:
        time.sleep(0.002)
        return matmul(*args, **keywords)

    torch.matmul = slow


def read_slowly() -> None:
    """From here on each batch takes 50 ms more."""

    def slow_next(*args: Any) -> Any:
        time.sleep(0.05)
        return next(*args)

    rank_speed.next = slow_next  # type: ignore[attr-defined]
