"""Runs a function on several gloo ranks, forked from the test's own process."""

import gc
import math
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.managers import SyncManager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ladder import cpu_platform

TIMEOUT_S = 500
GRACE_S = 20.0


def run_ranks(world_size: int, function: Callable, *args: Any, tmp_path: Path) -> list[Any]:
    """Calls `function(*args)` on every rank; returns what each returned, by rank.

    Raises AssertionError with a rank's traceback when one fails or does not end in time.
    """
    cpu_platform.enable()
    torch.set_num_threads(1)
    folder = tmp_path / "ranks"
    number = len(list(folder.iterdir())) if folder.is_dir() else 0
    folder = folder / str(number)
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(rank, world_size, function, args, folder))
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            process.start()
        wait_for(processes, TIMEOUT_S, GRACE_S)
    finally:
        end(processes)
    failures = [(folder / f"{rank}.error") for rank in range(world_size)]
    messages = [f.read_text() for f in failures if f.exists()]
    assert not messages, "\n".join(messages)
    codes = [process.exitcode for process in processes]
    assert codes == [0] * world_size, f"ranks ended with {codes}"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def wait_for(processes: Sequence[BaseProcess], timeout_s: float, grace_s: float = math.inf) -> None:
    """Until all have ended, or the time is over for all of them together. When one has failed, the others
    may wait for it: they have `grace_s` left."""
    deadline = time.monotonic() + timeout_s
    while left := [process for process in processes if process.exitcode is None]:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + grace_s)
        rest = deadline - time.monotonic()
        if rest <= 0 or not wait([process.sentinel for process in left], rest):
            return


def end(processes: Sequence[BaseProcess]) -> None:
    """Kills what still runs: else this process would wait for it when it ends."""
    for process in processes:
        if process.is_alive():
            process.kill()
        if process.pid is not None:
            process.join()


def fork_managers() -> None:
    """In a forked rank: the process through which writers of checkpoints report is forked as well.

    Spawned, as in a run of its own, it imports torch anew: seconds, for each rank that saves.
    """
    begin = SyncManager.__init__

    def forked(self: SyncManager, *args: Any, ctx: Any = None, **keywords: Any) -> None:
        begin(self, *args, ctx=multiprocessing.get_context("fork"), **keywords)

    SyncManager.__init__ = forked  # type: ignore[method-assign]


def leave_to_the_parent() -> None:
    """In a forked process, first of all: what it has inherited is never collected as garbage.

    Else a process group that the parent has not collected yet would be destroyed here. It would wait for
    its threads, which are not in this process: for ever, where another thread has one's memory by now.
    """
    gc.freeze()


def _rank(rank: int, world_size: int, function: Callable, args: tuple, folder: Path) -> None:
    leave_to_the_parent()
    try:
        fork_managers()
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        torch.save(function(*args), folder / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
