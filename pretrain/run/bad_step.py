"""The record of a bad step and of what was done about it: RUN/bad_steps/step_N.json."""

import json
from dataclasses import dataclass
from pathlib import Path

from pretrain.config.faults import BadStepPolicy


@dataclass(frozen=True)
class BadStep:
    """A bad step: what was found, and what is done about it."""

    step: int
    reason: str
    action: BadStepPolicy
    passed_over: tuple[int, int] | None
    """The first and the last step whose updates are not in the weights; None when the run stops."""


def bad_steps_of(run_dir: Path) -> list[BadStep]:
    """The bad steps of earlier starts of the run, except those that stopped it."""
    found = []
    for path in sorted((run_dir / "bad_steps").glob("step_*.json")):
        values = json.loads(path.read_text())
        over = values["passed_over"]
        if over:
            first, last = over
            found.append(BadStep(values["step"], values["reason"], values["action"], (first, last)))
    return found
