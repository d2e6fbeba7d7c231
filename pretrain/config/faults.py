"""The options about bad losses, hangs and slow ranks: `faults` in a run's configuration (train.py)."""

from dataclasses import dataclass
from typing import Literal

from megatron_ladder.errors import UserError

BadStepPolicy = Literal["stop", "skip", "rollback"]


@dataclass(frozen=True)
class FaultConfig:
    """What a run does about bad losses, hangs and slow ranks (docs/guides/faults.md)."""

    not_finite: BadStepPolicy = "stop"
    """At a loss or gradient norm of NaN or infinity: stop; skip: leave the update out and go on; or
    rollback: also undo the steps since the newest checkpoint, and go on after their data."""
    spike_factor: float = 0.0
    """A loss above so many times the median of the last 100 steps is a spike; 0: none is."""
    spike: BadStepPolicy = "rollback"
    """At a spike: stop, skip or rollback."""
    max_bad_steps: int = 20
    """Skipped and rolled back in the whole run, before it stops."""
    hang_s: float = 300.0
    """Seconds without a step, and 10 times the median step, after which stacks are written and the run
    ends; 12 times as long for a validation and a checkpoint; 0: never."""
    start_s: float = 3600.0
    """Seconds without progress in one phase of the start (reading a checkpoint, making index files, the
    first step, ...), after which stacks are written and the run ends; 0: never."""
    straggler_interval: int = 100
    """Steps between comparisons of the ranks' speed; 0: never."""

    def __post_init__(self) -> None:
        for name in ("spike_factor", "max_bad_steps", "hang_s", "start_s", "straggler_interval"):
            if (value := getattr(self, name)) < 0:
                raise UserError(f"faults.{name} is {value}: it must be at least 0")
        if 0 < self.spike_factor <= 1:
            raise UserError(
                f"faults.spike_factor is {self.spike_factor}: every second loss would be a spike, as half "
                "of all losses are above the median. Give more than 1, or 0 to turn the check off"
            )

    @property
    def may_skip(self) -> bool:
        """Whether a step may be skipped. Before the first checkpoint, rollback skips too."""
        return self.not_finite != "stop" or (self.spike_factor > 0 and self.spike != "stop")

    @property
    def allowance_s(self) -> float:
        """Seconds for anything that takes longer than a step; also the longest time that a rank waits for
        other ranks in a collective."""
        return 12 * self.hang_s if self.hang_s else 3600.0
