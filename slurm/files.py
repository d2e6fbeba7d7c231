"""Files that appear whole or not at all, files for the user alone, and files of strangers."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from slurm.errors import UserError

MOST_BYTES = 16 << 20


def read_bounded(path: Path) -> str:
    """A small file's text.

    Raises:
        UserError: it is larger than 16 MiB, or not UTF-8, or a pipe in a folder.
        OSError: it cannot be read.
    """
    if stat.S_ISFIFO(path.stat().st_mode) and path.parts[:2] != ("/", "dev"):
        raise UserError("it is a pipe, and not a file")
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UserError(f"it has more than {MOST_BYTES:,} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"it is not UTF-8 (byte {error.start})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object that a small JSON file holds. Its fields may still have any values.

    Raises:
        UserError: it is no such file.
        OSError: it cannot be read.
    """
    try:
        value = json.loads(read_bounded(path))
    except RecursionError:
        raise UserError("it has too many levels, one inside the other") from None
    except UserError:
        raise
    except ValueError as error:  # no JSON, or a number of thousands of digits
        raise UserError(str(error)) from None
    if not isinstance(value, dict):
        raise UserError("it must hold one JSON object")
    return value


def write_atomically(path: Path, text: str) -> None:
    """Writes a temporary sibling, makes sure it is on disk, and renames it.

    Arguments of the command line that were not UTF-8 are written as the bytes that they were.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb", opener=_not_linked) as file:
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


def _not_linked(path: str, flags: int) -> int:
    """A link in the file's place, which a stranger's folder may have, is not followed: OSError."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
