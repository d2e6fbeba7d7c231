"""Writes files that are whole or not there, and makes sure that they are on disk."""

import functools
import os
import secrets
from pathlib import Path

# Machines that share a folder may have processes of the same number, and containers the same name.
_OWN = secrets.token_hex(6)


def temporary_name(path: Path) -> Path:
    """A name beside `path`, for this process alone."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{_OWN}")


def write_durably(path: Path, text: str) -> None:
    """Writes a small file in one rename, safe from a loss of power."""
    temporary = temporary_name(path)
    temporary.write_text(text, encoding="utf-8")
    sync_file(temporary)
    temporary.replace(path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def real_place(path: str) -> str:
    """Where a file is, whatever it is called. A folder of many files is resolved once."""
    if os.path.islink(path):  # noqa: PTH114 (for each of a million files)
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    return os.path.join(_real_folder(folder), name)  # noqa: PTH118


@functools.lru_cache(maxsize=1024)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)
