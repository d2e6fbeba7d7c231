"""A process that renders a chat template, and that a template cannot keep busy, or fill, for ever.

A template is a program from the folder's author, and a conversation is its input from anybody. jinja's
sandbox keeps it from files and from code, but not from `{% for %}` in `{% for %}` or from `10 ** 10 ** 10`.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import orjson

from megatron_ladder.errors import UserError

RENDER_S = 10.0
"""Seconds of computing for one conversation."""
MEMORY = 512 << 20
"""Bytes that rendering may take, beside what the process has when it starts."""
MOST_CHARACTERS = 16 << 20
"""Of a rendered text."""

Rendering = Callable[[dict[str, Any]], str]


class TemplateProcess:
    """A process made of this one (by a fork, so before this one has threads and uses a GPU).

    Args:
        rendering: makes a text of what a client has sent. It may raise any exception.
    """

    def __init__(self, rendering: Rendering) -> None:
        self._ours, theirs = multiprocessing.Pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._ours.close()  # so that the pipe ends when the parent does
                _watch(rendering, theirs)
            finally:
                os._exit(0)
        theirs.close()

    def render(self, given: dict[str, Any]) -> str:
        """The text. One thread may call it at a time.

        Raises:
            UserError: the template refuses, or fails, or takes too much time or memory.
        """
        try:
            asked = orjson.dumps(given)
        except orjson.JSONEncodeError as error:  # a whole number of more than 64 bits
            raise UserError(f"the chat template cannot have these values: {error}") from error
        try:
            self._ours.send_bytes(asked)
            text, problem = orjson.loads(self._ours.recv_bytes())
        except (OSError, EOFError) as error:
            raise UserError("the chat template cannot be used: its process has ended") from error
        if problem is not None:
            raise UserError(problem)
        return text

    def close(self) -> None:
        """Ends the process."""
        self._ours.close()
        os.waitpid(self._pid, 0)


def _watch(rendering: Rendering, asked: Connection) -> None:
    """Lets a child render. When the kernel ends it, it says so, and lets another one go on."""
    # The server stops in its own time, and with it the pipe.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _limit_memory()
                _answer_all(rendering, asked)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return  # the pipe has ended
        took = f"{RENDER_S:.0f} seconds or {MEMORY >> 20} MiB"
        _answer(asked, None, f"the chat template takes more than {took} for these messages")


def _answer_all(rendering: Rendering, asked: Connection) -> None:
    signal.signal(signal.SIGVTALRM, _too_late)
    while True:
        try:
            given = orjson.loads(asked.recv_bytes())
        except EOFError:
            return
        text, problem = None, None
        # The alarm ends what Python does. What Python cannot end, such as comparing two lists of a million
        # million numbers, the kernel ends together with the process.
        # Again and again, as what is raised while Python collects garbage is lost.
        signal.setitimer(signal.ITIMER_VIRTUAL, RENDER_S, 0.1)
        signal.setitimer(signal.ITIMER_PROF, RENDER_S + 1)
        try:
            text = rendering(given)
            if len(text) > MOST_CHARACTERS:
                text, problem = (
                    None,
                    f"the chat template writes more than {MOST_CHARACTERS:,} characters",
                )
            elif not _is_unicode(text):
                text, problem = None, "the chat template writes what is no Unicode text"
        except _Late:
            problem = f"the chat template takes more than {RENDER_S:.0f} seconds for these messages"
        except MemoryError:
            problem = f"the chat template takes more than {MEMORY >> 20} MiB for these messages"
        except Exception as error:  # such as for two turns of one role in a row
            problem = f"the chat template refuses these messages: {str(error)[:500]}"
        finally:
            for timer in (signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
                signal.setitimer(timer, 0)
        _answer(asked, text, problem)


def _answer(asked: Connection, text: str | None, problem: str | None) -> None:
    if problem is not None:
        problem = problem.encode(errors="replace").decode()
    with contextlib.suppress(OSError):  # nobody waits for it any more
        asked.send_bytes(orjson.dumps([text, problem]))


class _Late(BaseException):
    """A template takes too long. No `except Exception` in a library keeps it."""


def _too_late(*_: object) -> None:
    raise _Late


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _limit_memory() -> None:
    """Address space, as that of memory is not limited by the kernel."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + MEMORY
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
