"""The record of a bad step and of what was done about it: RUN/bad_steps/step_N.json."""

from dataclasses import dataclass, fields
from pathlib import Path

from megatron_ladder.json_files import read_json
from pretrain.config.faults import BadStepPolicy
from pretrain.config.values import from_dict


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
        values = read_json(path, "the record of a bad step")
        known = {field.name: values.get(field.name) for field in fields(BadStep)}
        bad: BadStep = from_dict(BadStep, known, str(path))
        if bad.passed_over:
            found.append(bad)
    return found
