"""Documents out of JSON lines."""

from collections.abc import Iterator
from typing import Any

import orjson

from data_prep.errors import UserError
from data_prep.read.lines import naming, numbered_lines
from data_prep.read.reading import BadLines, NoTextField, Reading, not_utf8
from data_prep.read.records import text_of
from data_prep.read.sources import Segment
from data_prep.read.streams import Chunk

# When none of this many first lines has the text field, its name is taken to be wrong.
LINES_BEFORE_GIVING_UP = 10


def read_json_lines(
    segment: Segment, chunks: Iterator[Chunk], reading: Reading, bad: BadLines
) -> Iterator[list[str]]:
    path, good, seen = segment.source.path, 0, 0
    without: set[str] = set()
    problem: str | None = None
    simple = reading.fields[0] if len(reading.columns) == 1 and not reading.chat else None
    where = naming(segment)
    for lines in numbered_lines(segment, chunks, reading, bad):
        texts = []
        for number, line in lines:
            try:
                value = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                if not line.strip():
                    continue
                value = _json_with_bad_utf8(line, where(number), reading, bad, error)
            try:  # the usual case, and the fastest way
                text = value[simple]
                if type(text) is str:
                    texts.append(text)
                    continue
            except (KeyError, TypeError, IndexError):
                pass
            if value is None:
                continue
            seen += 1
            text, problem = text_of(value, reading)
            if problem is None:
                texts.append(text)
                continue
            if isinstance(value, dict):
                without |= set(value)
            if not good and not texts and without and seen >= LINES_BEFORE_GIVING_UP:
                raise _no_field(path, reading, without, problem)
            bad.add(where(number), problem)
        good += len(texts)
        line, value, text = b"", None, ""  # frees the last line, which may be long
        yield texts
    if not good and without:
        raise _no_field(path, reading, without, problem or "")


def _no_field(path: str, reading: Reading, without: set[str], problem: str) -> NoTextField:
    if not problem.startswith("no field"):
        return NoTextField(f"{path}: no line can be used: {problem}")
    fields, what = reading.fields, "text"
    if reading.id_field and problem == f"no field {reading.id_field!r}":
        fields, what = (reading.id_field,), "id"
    return NoTextField(
        f"{path}: no line has the {what} field {', '.join(map(repr, fields))}; they have "
        f"{', '.join(sorted(without)[:20])}: give --{what}-field NAME"
    )


def _json_with_bad_utf8(
    line: bytes, where: str, reading: Reading, bad: BadLines, error: Exception
) -> Any:
    """The value of a line that is not valid JSON: its bad UTF-8 replaced, if that is asked for and is
    enough. None: the line cannot be used."""
    try:
        line.decode()
    except UnicodeDecodeError as bad_bytes:
        if reading.invalid_utf8 == "stop":
            raise UserError(not_utf8(where, bad_bytes)) from bad_bytes
        if reading.invalid_utf8 == "replace":
            try:
                value = orjson.loads(line.decode(errors="replace"))
                bad.replaced += 1
                return value
            except orjson.JSONDecodeError as still:
                error = still
        else:
            bad.add(where, f"not UTF-8: {bad_bytes.reason} at byte {bad_bytes.start}")
            return None
    bad.add(where, f"not JSON: {error}")
    return None
