"""`megatron-ladder train`, its ranks forked from the test's own process: torchrun's import torch and
megatron-core anew, which takes longer than a small run. What torchrun itself does is tested with it, and
so is the process that `fork_managers` forks, where a run of its own spawns one.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pretrain.commands.train import train
from pretrain.processes import die_with_parent
from pretrain.start.arguments import parse_train
from pretrain.start.launch import local_ranks
from tests.ports import free_port
from tests.ranks import end, fork_managers, leave_to_the_parent, wait_for


def run_train(
    argv: list[str],
    log: Path,
    timeout_s: float,
    kill_when: Callable[[], bool] | None = None,
    first: Callable[[], None] = lambda: None,
) -> tuple[list[int | None], str]:
    """Trains to the end, on as many ranks as the command would start.

    Args:
        kill_when: when it is true, all ranks get SIGKILL.
        first: called in each rank before it trains, such as to replace what writes to a disk.

    Returns:
        The ranks' exit statuses, and what they printed.
    """
    ranks = local_ranks(*parse_train(argv))
    log.unlink(missing_ok=True)
    port = free_port()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(argv, rank, ranks, port, log, first))
        for rank in range(ranks)
    ]
    deadline = time.monotonic() + timeout_s
    try:
        for process in processes:
            process.start()
        while kill_when and any(process.is_alive() for process in processes):
            if kill_when() or time.monotonic() > deadline:
                break
            time.sleep(0.005)
        else:
            wait_for(processes, deadline - time.monotonic())
    finally:
        end(processes)
    return [process.exitcode for process in processes], log.read_text()


def _rank(
    argv: list[str], rank: int, ranks: int, port: int, log: Path, first: Callable[[], None]
) -> None:
    leave_to_the_parent()
    die_with_parent()
    fork_managers()
    first()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    if ranks > 1:  # as torchrun sets them
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    sys.exit(train(argv))
