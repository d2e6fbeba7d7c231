"""Measures several runs side by side, all ranks together."""

import gc
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

Key = TypeVar("Key")


def slowest(times: tuple[float, ...]) -> tuple[float, ...]:
    """A pass ends when its last rank does."""
    all_times = torch.tensor(times, dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(all_times, op=dist.ReduceOp.MAX)
    return tuple(all_times.tolist())


def measure(
    runs: dict[Key, Callable[[], tuple[float, ...]]], steps: int
) -> dict[Key, list[tuple[float, ...]]]:
    """Interleaved: every run once, then again, so that a slow moment hits all alike."""
    times: dict[Key, list[tuple[float, ...]]] = {key: [] for key in runs}
    gc.collect()
    gc.freeze()  # each run collects garbage first: a second, were it to look at all that is imported
    try:
        for step in range(steps + 1):  # the first warms up
            order = list(runs)
            order = order[step % len(order) :] + order[: step % len(order)]
            for key in order:
                seconds = slowest(runs[key]())
                if step > 0:
                    times[key].append(seconds)
            if dist.get_rank() == 0:
                print(f"\rrepetition {step} of {steps}", end="", file=sys.stderr, flush=True)
        if dist.get_rank() == 0:
            print(file=sys.stderr)
    finally:
        gc.unfreeze()  # also what a run without memory leaves behind
    return times
