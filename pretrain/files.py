"""Files that appear whole or not at all."""

import hashlib
import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a temporary sibling, makes sure it is on disk, and renames it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync(path: Path) -> None:
    """Makes sure a file's, or a folder's, content is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a small file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
