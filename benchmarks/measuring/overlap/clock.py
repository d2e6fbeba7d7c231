"""A clock of processor time, for a CPU that other programs use too.

Computation counts by the processor time of the thread that computes. A wait for the link is not slept; it
is added to the clock. Ranks tell each other by this clock when they have started a collective, so a
collective is under way as long as the link says, whatever else the machine does. What gloo's own threads do
does not count.
"""

import time
from typing import Any

from pretrain.bench import decoder, recorder, wire


class ProcessorClock:
    """Stands for the module `time` where a benchmark reads times."""

    def __init__(self) -> None:
        self._zero_s = 0.0

    def restart(self) -> None:
        """Before each step: ranks compare their times, so all begin at zero."""
        self._zero_s = time.thread_time()

    def perf_counter(self) -> float:
        return time.thread_time() - self._zero_s

    def sleep(self, seconds: float) -> None:
        """The clock goes on at once."""
        self._zero_s -= seconds


_used: list[ProcessorClock] = []


def use_processor_time() -> None:
    """From here on, passes, sub-modules and the modelled link are timed by this rank's processor time."""
    _used.append(ProcessorClock())
    modules: tuple[Any, ...] = (decoder, recorder, wire)
    for module in modules:
        module.time = _used[0]


def restart() -> None:
    """Before each step; does nothing if real time is used."""
    for clock in _used:
        clock.restart()
