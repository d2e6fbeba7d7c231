"""Which rank holds up the others.

In a step all ranks take the same time, as each waits for the slowest. So two things are measured that
involve no other rank: the time in which a rank gets its data, and, now and then, that of a fixed piece
of computing between two steps. Both cost milliseconds. megatron-core's StragglerDetector times the step
itself, waiting included, on GPUs only.
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
"""How much more time than the median is slow; of reading data, in shares of the step."""
REPEATS = 50
"""Matrix products that are timed."""


@dataclass(frozen=True)
class SlowRank:
    """The slowest rank at one of two things, where it is much behind."""

    rank: int
    host: str
    what: Ability
    seconds: float
    median: float
    """Of all ranks, in seconds."""


class RankSpeed:
    """Compares the ranks every `faults.straggler_interval` steps."""

    def __init__(self, config: TrainConfig) -> None:
        self._interval = config.faults.straggler_interval
        self._read_s = 0.0
        self._since = time.perf_counter()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; how long each took to come is counted."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self._read_s += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def slow_ranks(self, step: int) -> list[SlowRank]:
        """Called by all ranks after a step. [] when none is slow, or it is not time to compare."""
        if not self._interval or step % self._interval or dist.get_world_size() == 1:
            return []
        now = time.perf_counter()
        step_s, read_s = ((t / self._interval) for t in (now - self._since, self._read_s))
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (socket.gethostname(), _compute_s(), read_s, step_s))
        self._read_s, self._since = 0.0, time.perf_counter()
        return compare(ranks)


def compare(ranks: list[tuple[str, float, float, float]]) -> list[SlowRank]:
    """The ranks to name.

    Args:
        ranks: of each rank: host, seconds of computing, of reading a step's data, of a whole step.
    """
    hosts, computing, reading, steps = zip(*ranks, strict=True)
    slow = []
    measured: tuple[tuple[Ability, tuple[float, ...]], ...]
    measured = (("computing", computing), ("reading data", reading))
    for what, seconds in measured:
        slowest = max(range(len(ranks)), key=seconds.__getitem__)
        # The lower one of two ranks in the middle: with two ranks the other one.
        median = statistics.median_low(seconds)
        # A slow reader whose data is there in no time holds up nobody.
        scale = median if what == "computing" else steps[slowest]
        if seconds[slowest] - median > SLOW * scale:
            slow.append(SlowRank(slowest, hosts[slowest], what, seconds[slowest], median))
    return slow


def _compute_s() -> float:
    """Seconds that this rank takes for the same matrix products as any other."""
    on_gpu = torch.cuda.is_available()
    size, dtype = (2048, torch.bfloat16) if on_gpu else (256, torch.float32)
    x = torch.full((size, size), 1 / size, dtype=dtype, device=torch.cuda.current_device())
    for repeats in (1, REPEATS):  # the first makes what is made once
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            torch.matmul(x, x)
        if on_gpu:
            torch.cuda.synchronize()
    return time.perf_counter() - started
