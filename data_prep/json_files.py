"""Reads JSON files that a stranger may have written. Whatever they hold, the worst is a sentence."""

import codecs
import json
import re
import reprlib
import stat
from pathlib import Path
from typing import Any

from data_prep.errors import UserError

# A file that lists nothing is some kilobytes. Parsed JSON takes up to 25 times the bytes of its text.
MOST_BYTES = 16 << 20
# Files of this project have 5 levels. What is read is written, compared and shown by recursion.
MOST_LEVELS = 100
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def read_json(path: Path, what: str, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The object that a JSON file holds. Its fields may still have any values.

    Args:
        what: what the file should be, for messages, such as "a run's configuration".
        most_bytes: a larger file is not read.

    Raises:
        UserError: it is too large, or not one JSON object in UTF-8, or nested in too many levels.
        OSError: it cannot be read.
    """
    refuse_pipe(path, what)
    with path.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise UserError(f"{path} is not {what}: it has more than {most_bytes:,} bytes")
    return parse_json(data, f"{path} is not {what}")


def refuse_pipe(path: Path, what: str) -> None:
    """Refuses a pipe or a device in a stranger's folder: reading it could take for ever. Those in /dev are
    the user's own: `--config <(...)`."""
    is_plain = stat.S_ISREG(mode := path.stat().st_mode) or stat.S_ISDIR(mode)
    if not is_plain and path.parts[:2] != ("/", "dev"):
        raise UserError(f"{path} is not {what}: it is not a regular file")


def parse_json(data: bytes, wrong: str) -> dict[str, Any]:
    """The same, of bytes that were read. `wrong` begins each message."""
    try:
        text = data.decode()
        value = json.loads(text)
    except UnicodeDecodeError as error:
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        encoding = "UTF-16" if utf16 else f"not UTF-8 (byte {error.start})"
        raise UserError(f"{wrong}: it is {encoding}: save it as UTF-8") from None
    except RecursionError:
        raise UserError(f"{wrong}: it has too many levels, one inside the other") from None
    except ValueError as error:  # no JSON, or a number of thousands of digits
        raise UserError(f"{wrong}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{wrong}: it must hold one JSON object")
    if _is_deep(value):
        raise UserError(f"{wrong}: it has more than {MOST_LEVELS} levels, one inside the other")
    return value


def short(value: Any) -> str:
    """A value for a message: a long one is cut, and control characters are escaped."""
    return reprlib.repr(value)


def is_whole(value: Any, least: int, most: int) -> bool:
    """Whether a value of JSON is a whole number in a range. True and 2.0 are none."""
    return type(value) is int and least <= value <= most


def is_word(value: Any) -> bool:
    """Whether it is a string without control characters, which could steer a terminal."""
    return isinstance(value, str) and _CONTROL.search(value) is None


def is_utf8(text: str) -> bool:
    """Whether it can be printed: it holds no half of a character, as names of files may."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_LEVELS):
        inner = (v for one in level for v in (one.values() if isinstance(one, dict) else one))
        level = [v for v in inner if isinstance(v, dict | list)]
        if not level:
            return False
    return True
