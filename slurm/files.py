"""Files that appear whole or not at all, and files for the user alone."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Writes a temporary sibling, makes sure it is on disk, and renames it.

    Arguments of the command line that were not UTF-8 are written as the bytes that they were.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(os.fsencode(text))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_privately(path: Path, content: bytes) -> None:
    """Writes a new file that only its owner may read, whatever the umask is."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)
        file.write(content)
        file.flush()
        os.fsync(descriptor)
