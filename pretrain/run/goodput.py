"""How much of a run's wall-clock went into steps that counted, and where the rest went."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.run.status import read_starts, read_status


@dataclass(frozen=True)
class Goodput:
    """Times in seconds, by the clocks of the machines that the run was on."""

    wall: float
    """From the first start to the last word of status.json."""
    counted: float
    """In steps that are in the newest weights; no validation, no checkpoint, no step done again."""
    starting: float
    """From starts to their first steps."""
    between: float
    """From the last word of a start to the next one."""
    steps_again: int
    """Steps lost with a start and done again by the next."""
    ends: Counter[str]
    """How the starts before the last ended."""

    @property
    def share(self) -> float:
        return min(1.0, self.counted / max(self.wall, 1e-9))


def read_goodput(run_dir: Path, counted: float) -> Goodput | None:
    """From RUN/starts.jsonl and status.json; None for a run that has none.

    Args:
        counted: training time of the last line of metrics.
    """
    lines, status = read_starts(run_dir), read_status(run_dir)
    if not lines or status is None:
        return None
    starting = between = 0.0
    again = 0
    ends: Counter[str] = Counter()
    start: dict[str, Any] = lines[0]
    for line in lines:
        if line["kind"] == "start":
            start = line
            if before := line["before"]:
                between += max(0.0, line["unix_time"] - before["unix_time"])
                ends[before["reason"] or before["state"]] += 1
        else:
            starting += max(0.0, line["unix_time"] - start["unix_time"])
            if start["before"]:
                again += max(0, start["before"]["step"] - line["step"])
    wall = max(0.0, status["unix_time"] - lines[0]["unix_time"])
    return Goodput(wall, counted, starting, between, again, ends)
