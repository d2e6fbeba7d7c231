"""Options: which steps of a run to trace. pretrain/loop/profile.py records the trace."""

from dataclasses import dataclass

from megatron_ladder.errors import UserError


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps by torch's profiler, into the run's folder `profile`.

    docs/design/overlap.md reads one.
    """

    first_step: int | None = None
    """None traces nothing."""
    steps: int = 2
    """How many; a trace of each rank grows by some megabytes a step."""

    def check(self, train_steps: int) -> None:
        """Refuses a window that no step is in.

        Raises:
            UserError: it begins after the run, or has a length and no beginning.
        """
        if self.first_step is None and self.steps != type(self).steps:
            raise UserError(
                f"profile.steps is {self.steps}, but profile.first_step is not set: set it, or leave the "
                "other out"
            )
        if self.first_step is not None and self.first_step > train_steps:
            raise UserError(
                f"profile.first_step {self.first_step} is after the run's {train_steps} steps: choose an "
                "earlier one"
            )
