"""A training's history: its script writes a line for every start and every end."""

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from slurm.errors import UserError
from slurm.files import read_bounded

_STATUS = re.compile(r"[0-9]{1,3}( |$)")


@dataclass(frozen=True)
class History:
    """What the lines of a history say."""

    starts: int
    last: str
    """Why the last start ended, in words; empty while it goes on."""


def read_history(folder: Path) -> History:
    """Lines are `TIME start NUMBER CHECKPOINT on HOSTS`, `TIME end STATUS CHECKPOINT ASKED` and
    `TIME stop WHY`."""
    try:
        text = read_bounded(folder / "history")
    except (FileNotFoundError, UserError):
        return History(0, "")
    lines = [line.split(maxsplit=2) for line in text.splitlines()]
    starts = sum(line[1:2] == ["start"] for line in lines)
    last = lines[-1] if lines else []
    if last[1:2] == ["stop"] and len(last) == 3:
        return History(starts, last[2])
    if last[1:2] == ["end"] and len(last) == 3 and _STATUS.match(last[2]):
        return History(starts, _in_words(last[2].split()))
    return History(starts, "")


def _in_words(end: list[str]) -> str:
    status, asked = int(end[0]), end[2] if len(end) == 3 else " ".join(end[2:])
    if len(end) > 3:
        return asked  # the script's own words
    if status == 0:
        return "finished"
    if status == 2:
        return "stopped at a user's mistake, which the log names"
    if status == 75:
        why = {"limit": "before the time limit", "stop": "as it was asked to"}.get(asked, "")
        return f"stopped in good order {why}".rstrip()
    if 128 < status < 128 + signal.NSIG:
        try:
            return f"a rank was ended by {signal.Signals(status - 128).name}"
        except ValueError:
            pass
    return f"a rank ended with status {status}"
