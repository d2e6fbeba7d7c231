"""Options: which steps of a run to trace. pretrain/loop/profile.py records the trace."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps by torch's profiler, into the run's folder `profile`.

    docs/design/overlap.md reads one.
    """

    first_step: int | None = None
    """None traces nothing."""
    steps: int = 2
    """How many; a trace of each rank grows by some megabytes a step."""
