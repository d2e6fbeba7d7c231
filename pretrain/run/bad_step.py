"""A bad step that a run has decided about: RUN/bad_steps/step_N.json."""

import json
from dataclasses import dataclass
from pathlib import Path

from pretrain.config.faults import BadStepPolicy


@dataclass(frozen=True)
class BadStep:
    """What was found, and what is done about it."""

    step: int
    reason: str
    action: BadStepPolicy
    passed_over: tuple[int, int] | None
    """The first and the last step that is not in the weights; None: the run stops."""


def bad_steps_of(run_dir: Path) -> list[BadStep]:
    """What earlier starts of the run decided."""
    found = []
    for path in sorted((run_dir / "bad_steps").glob("step_*.json")):
        values = json.loads(path.read_text())
        over = values["passed_over"]
        if over:
            first, last = over
            found.append(BadStep(values["step"], values["reason"], values["action"], (first, last)))
    return found
