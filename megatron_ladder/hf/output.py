"""A folder that appears complete or not at all."""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megatron_ladder.errors import UserError


def check_unused(output_dir: Path) -> None:
    """Refuses a folder that is in use; before long work.

    Raises:
        UserError: it is a file, or holds something.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir} exists and is not a folder: choose another output folder")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise UserError(f"{output_dir} is not empty: choose another output folder, or remove it")


@contextmanager
def complete_or_absent(output_dir: Path) -> Iterator[Path]:
    """A temporary sibling of `output_dir` that becomes it when the block ends without an error.

    Raises:
        UserError: at once, as `check_unused`.
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
    """Gives a function that has a file brought to disk, in a thread, while more is made and written.

    Raises:
        OSError: at the end of the block.
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
