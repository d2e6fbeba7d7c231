"""Writes an output folder so that it is complete or absent."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from megatron_ladder.errors import UserError


def check_unused(output_dir: Path) -> None:
    """Checks that an output folder is not in use. Call it before long work.

    Raises:
        UserError: it is a file, or it is not empty.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir} exists and is not a folder: choose another output folder")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise UserError(f"{output_dir} is not empty: choose another output folder, or remove it")


@contextmanager
def complete_or_absent(output_dir: Path) -> Iterator[Path]:
    """Gives a folder of the same name in a temporary folder `.NAME.tmp-...` beside `output_dir`.

    When the block ends without an error, the folder is moved to `output_dir`. Otherwise it is removed. What
    processes left that were killed while they wrote an `output_dir` of this name is removed first.

    Raises:
        UserError: from `check_unused`, before the block starts.
    """
    check_unused(output_dir)
    parent, name = output_dir.absolute().parent, output_dir.absolute().name
    parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(parent, f".{name}.tmp-")
    # The name is drawn: process ids of two containers may be the same.
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}.tmp-", dir=parent))
    held = _hold(temporary)
    try:
        folder = temporary / name
        folder.mkdir()
        yield folder
        for path in [*folder.rglob("*"), folder]:
            _fsync(path)
        folder.replace(output_dir)
        _fsync(parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        held.close()


_LOCK = "lock"


def _hold(temporary: Path) -> IO[bytes]:
    """Locks a temporary folder until the returned file is closed, or the process ends, however it ends.

    The file gets its name when the lock is held, so that no one finds it unlocked before.
    """
    file = (temporary / f"{_LOCK}.new").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks: the folder is then never taken for a leftover
        return file
    (temporary / f"{_LOCK}.new").rename(temporary / _LOCK)
    return file


def _remove_leftovers(parent: Path, prefix: str) -> None:
    """Removes temporary folders whose lock nobody holds. A process on another node may hold one."""
    for folder in parent.iterdir():
        if not folder.name.startswith(prefix) or not (folder / _LOCK).is_file():
            continue
        try:
            with (folder / _LOCK).open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # somebody holds it, has just removed it, or is another user
            continue


@contextmanager
def synced_behind() -> Iterator[Callable[[Path], None]]:
    """Gives a function that syncs a file to disk in a thread, while the caller writes the next one.

    Raises:
        OSError: a file could not be synced. It is raised at the end of the block.
    """
    with ThreadPoolExecutor(1) as thread:
        files = []
        yield lambda path: files.append(thread.submit(_fsync, path))
        for file in files:
            file.result()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_others(folder: Path, content: Iterable[tuple[str, bytes | memoryview]]) -> None:
    """Compares files of a folder with what they should hold.

    Args:
        content: a file's name and the bytes that follow in it; the parts of several files may alternate.

    Raises:
        UserError: a file is missing, or holds something else.
    """
    with ExitStack() as stack:
        opened: dict[str, IO[bytes]] = {}
        for name, expected in content:
            if name not in opened:
                if not (folder / name).is_file():
                    raise UserError(f"{folder / name} is missing")
                opened[name] = stack.enter_context((folder / name).open("rb"))
            if opened[name].read(len(expected)) != expected:
                raise UserError(f"{folder / name} holds something else")
        for name, file in opened.items():
            if file.read(1):
                raise UserError(f"{folder / name} holds more")
