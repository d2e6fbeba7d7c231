"""Finds slow ranks, which make all other ranks wait.

In a step all ranks take the same time, since each waits for the slowest. So two things are measured that
involve no other rank: the time that a rank needs to get its data and, from time to time, the time of a
fixed computation between two steps. Both cost milliseconds. megatron-core's StragglerDetector times the
step itself, including the waiting, and works on GPUs only.
"""

import socket
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from pretrain.config.train import TrainConfig
from pretrain.data.batches import Batch

Ability = Literal["computing", "reading data"]
SLOW = 0.2
"""A rank is slow when it takes more than the median by this share: of the median for computing, of the
step's time for reading data."""
REPEATS = 50
"""The number of matrix products that are timed."""


@dataclass(frozen=True)
class SlowRank:
    """The slowest rank at computing or at reading data, where it is much slower than the median."""

    rank: int
    host: str
    what: Ability
    seconds: float
    median: float
    """The median of all ranks, in seconds."""


class RankSpeed:
    """Compares the ranks every `faults.straggler_interval` steps."""

    def __init__(self, config: TrainConfig, *, reads: bool = True) -> None:
        """`reads`: whether this rank reads data; of the others only computing is compared."""
        self._reads = reads
        self._interval = config.faults.straggler_interval
        self._read_s = 0.0
        self._since = time.perf_counter()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Passes the batches on, and adds up the time that each took to arrive."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self._read_s += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def slow_ranks(self, step: int) -> list[SlowRank]:
        """The slow ranks; [] when none is slow, or when this is no step to compare at.

        Called by all ranks after every step.
        """
        if not self._interval or step % self._interval or dist.get_world_size() == 1:
            return []
        now = time.perf_counter()
        step_s, read_s = ((t / self._interval) for t in (now - self._since, self._read_s))
        ranks: list[Any] = [None] * dist.get_world_size()
        mine = (socket.gethostname(), _compute_s(), read_s if self._reads else None, step_s)
        dist.all_gather_object(ranks, mine)
        self._read_s, self._since = 0.0, time.perf_counter()
        return compare(ranks)


def compare(ranks: list[tuple[str, float, float | None, float]]) -> list[SlowRank]:
    """The slow ranks: at most one for computing and one for reading data.

    Args:
        ranks: for each rank its host, and the seconds of the fixed computation, of reading a step's data
            and of a whole step. None for reading: the rank reads none.
    """
    hosts, computing, reading, steps = zip(*ranks, strict=True)
    slow = []
    measured: tuple[tuple[Ability, tuple[float | None, ...]], ...]
    measured = (("computing", computing), ("reading data", reading))
    for what, all_seconds in measured:
        seconds = {rank: s for rank, s in enumerate(all_seconds) if s is not None}
        slowest = max(seconds, key=seconds.__getitem__)
        # Of two ranks in the middle the faster one: of two ranks, the one that is not the slowest.
        median = statistics.median_low(seconds.values())
        # Reading is compared with the step: a rank that reads slowly, but in a time that is short beside
        # the step, makes nobody wait.
        scale = median if what == "computing" else steps[slowest]
        if seconds[slowest] - median > SLOW * scale:
            slow.append(SlowRank(slowest, hosts[slowest], what, seconds[slowest], median))
    return slow


def _compute_s() -> float:
    """Seconds that this rank takes for a fixed number of matrix products, the same on every rank."""
    on_gpu = torch.cuda.is_available()
    size, dtype = (2048, torch.bfloat16) if on_gpu else (256, torch.float32)
    x = torch.full((size, size), 1 / size, dtype=dtype, device=torch.cuda.current_device())
    # The first product is not in the result: in it, libraries make what they make only once.
    for repeats in (1, REPEATS):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            torch.matmul(x, x)
        if on_gpu:
            torch.cuda.synchronize()
    return time.perf_counter() - started
