"""Files that appear whole or not at all."""

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
