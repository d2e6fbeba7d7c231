"""The processes that work through parts, and what happens when one of them is killed."""

import os
import signal
from typing import Any

import pytest

from data_prep.errors import UserError
from data_prep.parts.plan import Part
from data_prep.parts.pool import Tally, Work, work_through
from data_prep.progress import Progress
from data_prep.read.reading import BadLines


def killed_while_it_adds(tally: Tally) -> Work:
    def work(part: Part) -> dict[str, Any]:
        tally.bytes.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    return work


@pytest.mark.timeout(60)
def test_a_process_killed_while_it_holds_the_tally_ends_the_work() -> None:
    """The kernel, short of memory, may kill a process anywhere. Nobody gives its lock back."""
    parts = [Part(number, ()) for number in range(3)]
    progress = Progress(0, "killing")
    with pytest.raises(UserError, match="a process was killed from outside"):
        work_through(killed_while_it_adds, parts, 2, BadLines(0), progress)
