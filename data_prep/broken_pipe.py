"""What a command does with its output. When nobody reads it any more (`| head`), it ends, silently.
What the terminal's encoding lacks, such as bytes of file names that are not UTF-8, is escaped.

All commands use it. It is in data_prep because `python -m data_prep` imports no other package.
"""

import io
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import TextIO

BROKEN_PIPE = 128 + signal.SIGPIPE
"""The exit status that a shell sees of cat, grep or git, which SIGPIPE ends. Not 0: the work may be cut
off. Python ignores the signal, and must: a server lives on when a client has gone."""


def run(command: Callable[[], int]) -> int:
    """The exit status of a command; BROKEN_PIPE where stdout or stderr has lost its reader."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            status = command()
        except SystemExit:  # tyro's, after --help
            _flush()
            raise
        # Not left to the interpreter's end, which would complain.
        _flush()
        return status
    except BrokenPipeError:
        # A stream is None when it was closed before Python started (`>&-`).
        open_ones = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
        unread = [stream for stream in open_ones if _has_no_reader(stream)]
        if not unread:  # another pipe's, or a socket's
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in unread:  # what they still hold goes there
            os.dup2(nowhere, stream.fileno())
        # A rank prints its results when its work is done; for another status torchrun would print a page.
        # But messages on stderr come in the middle of the work.
        is_done = "RANK" in os.environ and sys.stdout in unread
        return 0 if is_done else BROKEN_PIPE


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _has_no_reader(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
