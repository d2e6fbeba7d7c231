"""Trains on ranks forked from the test's own process, each of which may be given a fault."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ladder import cpu_platform
from pretrain import commands, rank_speed, step, watchdog
from pretrain import train as training

TIMEOUT_S = 150


@dataclass(frozen=True)
class Fault:
    """What goes wrong, on which rank, at which steps of this start (counted from 1)."""

    do: Callable[[], None]
    rank: int
    steps: tuple[int, ...]


def train_with(
    argv: list[str], fault: Fault | None = None, *, world_size: int, log: Path
) -> list[int]:
    """`megatron-ladder train ARGV` on so many ranks. Returns their exit statuses.

    Args:
        log: what all ranks print is added to it.
    """
    cpu_platform.enable()
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, port, argv, fault, log))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + TIMEOUT_S
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode or 0 for process in ranks]


def _rank(
    rank: int, world_size: int, port: int, argv: list[str], fault: Fault | None, log: Path
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # pytest's are files of its own
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if fault and fault.rank == rank:
        _at_steps(fault)
    status = commands.train(argv)
    sys.stdout.flush()
    os._exit(status)


def _at_steps(fault: Fault) -> None:
    train_step, taken = training.train_step, [0]

    def faulty(*args: Any) -> Any:
        taken[0] += 1
        if taken[0] in fault.steps:
            fault.do()
        result = train_step(*args)
        step._masked_sum = masked_sum
        return result

    masked_sum = step._masked_sum
    training.train_step = faulty


def losses_times(factor: float) -> Callable[[], None]:
    """This rank's losses of one step, and their gradients."""

    def do() -> None:
        masked_sum = step._masked_sum
        step._masked_sum = lambda scale, config, batch, output: masked_sum(
            scale, config, batch, output * factor
        )

    return do


def hang() -> None:
    watchdog.GRACE_S = 1.0
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
    rank_speed.next = _slow_next  # type: ignore[attr-defined]


def _slow_next(*args: Any) -> Any:
    time.sleep(0.05)
    return next(*args)
