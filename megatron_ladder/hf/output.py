"""Writes an output folder so that it is complete or absent."""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

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
    """Gives a temporary folder beside `output_dir`.

    When the block ends without an error, the folder is renamed to `output_dir`. Otherwise it is removed.

    Raises:
        UserError: from `check_unused`, before the block starts.
    """
    check_unused(output_dir)
    parent = output_dir.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".{output_dir.absolute().name}.tmp-{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _fsync(path)
        temporary.replace(output_dir)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync(parent)


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
