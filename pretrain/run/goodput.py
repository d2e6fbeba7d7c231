"""Goodput: how much of a run's wall-clock time went into steps that count, and where the rest went."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ladder.json_files import in_words
from pretrain.run.status import read_starts, read_status


@dataclass(frozen=True)
class Goodput:
    """Times in seconds, by the clocks of the machines on which the run was started."""

    wall: float
    """From the first start to the last time that status.json was written."""
    counted: float
    """Spent in steps that are in the newest weights: no validation, no checkpoint, no repeated step."""
    starting: float
    """From each start to the beginning of its training, summed over the starts."""
    between: float
    """From the last status of each start to the next start, summed."""
    steps_again: int
    """Steps that were lost when a start ended, and that the next start repeated."""
    ends: Counter[str]
    """How all starts but the last ended: the reason or the state, and how many times."""

    @property
    def share(self) -> float:
        return min(1.0, self.counted / max(self.wall, 1e-9))


def read_goodput(run_dir: Path, counted: float) -> Goodput | None:
    """Computes a run's goodput from RUN/starts.jsonl and status.json; None for a run without these files.

    Args:
        counted: the training time, in seconds, of the last line in metrics.jsonl.
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
            if before := line.get("before"):
                between += max(0.0, line["unix_time"] - before["unix_time"])
                ends[in_words(before["reason"] or before["state"])] += 1
        else:
            starting += max(0.0, line["unix_time"] - start["unix_time"])
            if start.get("before"):
                again += max(0, start["before"]["step"] - line["step"])
    wall = max(0.0, status["unix_time"] - lines[0]["unix_time"])
    return Goodput(wall, counted, starting, between, again, ends)
