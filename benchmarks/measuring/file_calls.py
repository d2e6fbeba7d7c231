"""Counts the calls of Python code that ask a file system for something, in a process and those it forks.

Counted are opens and listings of folders (by `sys.addaudithook`, so also numpy's and torch's) and stats (by
wrappers around `os.stat` and `os.lstat`, through which `pathlib` and `os.path` go). Not counted are calls
of C++ code, and `fstat` of an open file, which a file system answers without its metadata server.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = ("opens", "stats", "listings")
_EVENTS = {"open": "opens", "os.listdir": "listings", "os.scandir": "listings"}


class FileCalls:
    """Counts from its making on, below some folders. It cannot be switched off: make it in a process that
    ends soon."""

    def __init__(self, places: dict[str, Path]) -> None:
        """
        Args:
            places: folders by a name; the names go into the counts.
        """
        self._names = [(str(folder.absolute()), name) for name, folder in places.items()]
        keys = [(name, kind) for name in places for kind in KINDS]
        self._slots = {key: number for number, key in enumerate(keys)}
        # Shared with forked processes: those that load data and write checkpoints.
        self._counts = multiprocessing.get_context("fork").Array("q", len(keys))
        sys.addaudithook(self._heard)
        os.stat = self._counting(os.stat)
        os.lstat = self._counting(os.lstat)

    def so_far(self) -> dict[str, dict[str, int]]:
        """By place and kind."""
        found: dict[str, dict[str, int]] = {}
        for (name, kind), slot in self._slots.items():
            found.setdefault(name, {})[kind] = self._counts[slot]
        return found

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if kind := _EVENTS.get(event):
            self._count(arguments[0], kind)

    def _counting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any, *args: Any, **options: Any) -> Any:
            self._count(path, "stats")
            return real(path, *args, **options)

        return counted

    def _count(self, path: Any, kind: str) -> None:
        if not isinstance(path, str | os.PathLike):
            return
        text = str(Path(path).absolute())
        for folder, name in self._names:
            if text == folder or text.startswith(folder + os.sep):
                with self._counts.get_lock():
                    self._counts[self._slots[name, kind]] += 1
                return
