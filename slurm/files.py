"""Files that appear whole or not at all."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Writes a temporary sibling, makes sure it is on disk, and renames it.

    Arguments that were no UTF-8 on the command line become the bytes they were.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(os.fsencode(text))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
