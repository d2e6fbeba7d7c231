"""Becomes a command of `megatron-ladder` that disturbs a training as little as it can.

    python -m pretrain.watch.child PID NICE COMMAND...     PID: of the process that starts it

It ends when that process ends, and when memory is full, Linux ends it first. With NICE 19 its priority is
the lowest.
"""

import contextlib
import os
import sys
from pathlib import Path

from pretrain.processes import die_with_parent


def main() -> None:
    """Takes the priority and becomes the command. All of it outlasts `exec`."""
    parent, nice, *command = sys.argv[1:]
    die_with_parent(int(parent))
    # Linux may share out time by sessions first (autogroup). Then a session has a priority too, and those
    # of processes count within one alone. Each rank of a launcher has a session, so this gets its own.
    os.setsid()
    os.nice(int(nice))
    for file, value in (("autogroup", nice), ("oom_score_adj", "1000")):
        with contextlib.suppress(OSError):  # only Linux has them
            Path("/proc/self", file).write_text(value)
    os.execv(command[0], command)  # noqa: S606 (a list, no shell)


if __name__ == "__main__":
    main()
