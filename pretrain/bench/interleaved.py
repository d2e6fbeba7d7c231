"""Measures several runs side by side, all ranks together."""

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist

Key = TypeVar("Key")
LEAST = 3
"""Repetitions that are measured in any case: a median of fewer says little."""


def slowest(times: tuple[float, ...]) -> tuple[float, ...]:
    """Of all ranks: a pass ends when its last rank ends."""
    all_times = torch.tensor(times, dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(all_times, op=dist.ReduceOp.MAX)
    return tuple(all_times.tolist())


def measure(
    runs: dict[Key, Callable[[], tuple[float, ...]]],
    steps: int,
    limit_s: float = math.inf,
    *,
    keep_what_is_there: bool = False,
) -> dict[Key, list[tuple[float, ...]]]:
    """Runs every run once, then every run again: a slow moment of the machine then hits all of them.

    Args:
        runs: each returns the seconds of its parts.
        steps: repetitions.
        limit_s: for all of it. No repetition begins that would end later, if it takes as long as those
            before it; but LEAST are measured in any case. All ranks must be given the same.
        keep_what_is_there: an interrupt (gpu.py's limit, Ctrl-C) ends the measurement, and complete
            repetitions are returned, if there are two. Not for several ranks, which would have to agree.

    Returns:
        Seconds of each run, by repetition. A first repetition, which warms up, is left out.
    """
    times: dict[Key, list[tuple[float, ...]]] = {key: [] for key in runs}
    begin_s = time.perf_counter()
    gc.collect()
    gc.freeze()  # runs collect garbage: a second each, if all that is imported were searched too
    try:
        for step in range(steps + 1):  # the first warms up
            if step > LEAST:
                (spent_s,) = slowest((time.perf_counter() - begin_s,))  # the same on all ranks
                if spent_s * (step + 1) / step > limit_s:
                    break
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
    except KeyboardInterrupt:
        complete = min(map(len, times.values()))
        if not keep_what_is_there or complete < 2:
            raise
        times = {key: found[:complete] for key, found in times.items()}
        print(f"\nInterrupted: {complete} of {steps} repetitions are kept", flush=True)
    finally:
        gc.unfreeze()  # after a run that failed too
    return times


def quotients(a: Iterable[float], b: Iterable[float]) -> list[float]:
    """Quartiles of one run's seconds over another's, each pair from one repetition."""
    return statistics.quantiles([x / y for x, y in zip(a, b, strict=True)], n=4)
