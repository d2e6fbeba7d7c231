"""The options about what goes wrong in a run: a part of its configuration (config.py)."""

from dataclasses import dataclass
from typing import Literal

from megatron_ladder.errors import UserError

BadStepPolicy = Literal["stop", "skip", "rollback"]


@dataclass(frozen=True)
class FaultConfig:
    """What a run does about bad losses, hangs and slow ranks (docs/reliability.md)."""

    not_finite: BadStepPolicy = "stop"
    """At a loss or gradient norm of NaN or infinity: stop; skip: leave the update out and go on; or
    rollback: also undo the steps since the newest checkpoint, and go on after their data."""
    spike_factor: float = 0.0
    """A loss above so many times the median of the last 100 steps is a spike; 0: none is."""
    spike: BadStepPolicy = "rollback"
    """At a spike: stop, skip or rollback."""
    max_bad_steps: int = 20
    """Skipped and rolled back in the whole run, before it stops."""
    hang_factor: float = 10.0
    """A step that takes so many times the median hangs: stacks are written and the run ends; 0: never."""
    hang_floor_s: float = 300.0
    """No step hangs that takes less, in seconds."""
    hang_allowance_s: float = 3600.0
    """The same for the first step, a validation and a checkpoint; and for any collective."""
    straggler_interval: int = 100
    """Steps between comparisons of the ranks' speed; 0: never."""
    straggler_fraction: float = 0.2
    """A rank is named that takes so much more time than the median."""

    def __post_init__(self) -> None:
        for name, least in (
            ("spike_factor", 0),
            ("max_bad_steps", 0),
            ("hang_factor", 0),
            ("hang_floor_s", 0),
            ("hang_allowance_s", 1),
            ("straggler_interval", 0),
            ("straggler_fraction", 0),
        ):
            if (value := getattr(self, name)) < least:
                raise UserError(f"faults.{name} is {value}: it must be at least {least}")
        for name in ("spike_factor", "hang_factor"):
            if 0 < (factor := getattr(self, name)) <= 1:
                raise UserError(
                    f"faults.{name} is {factor}: every second step is above 1 median; give more than "
                    "1, or 0 to turn it off"
                )
