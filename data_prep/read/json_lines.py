"""Documents out of JSON: an object a line, or an array of objects."""

import codecs
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import orjson

from data_prep.errors import UserError
from data_prep.read.json_values import HEAD_BYTES, JsonValues, Shape, shape_of
from data_prep.read.lines import (
    BLOCK_BYTES,
    LINE_BYTES,
    naming,
    numbered_lines,
    taken_out,
    until_damage,
)
from data_prep.read.reading import BadLines, NoTextField, Reading, TooManyBadLines, replaces
from data_prep.read.records import fields_of, in_utf8, text_of, without_surrogates
from data_prep.read.sources import Segment
from data_prep.read.streams import Chunk, read_head

# When none of this many first records has the text field, its name is taken to be wrong.
RECORDS_BEFORE_GIVING_UP = 10
# Of the names of fields, kept for a message, so many, and of each so many characters.
NAMES = 100

Records = Iterator[tuple[int, bytes]]
"""JSON values with their numbers, or those of their lines."""


def read_json(
    segment: Segment, chunks: Iterator[Chunk], reading: Reading, bad: BadLines
) -> Iterator[list[str]]:
    """The texts, in batches.

    Raises:
        UserError: no record has the text field, or the file is damaged.
    """
    path, named, seen = segment.source.path, False, 0
    others: set[str] = set()
    simple = reading.fields[0] if len(reading.columns) == 1 and not reading.chat else None
    for where, records in _records(segment, chunks, reading, bad):
        texts = []
        for number, record in records:
            try:
                value = orjson.loads(record)
            except orjson.JSONDecodeError as error:
                if not record.strip():
                    continue
                value = _other_json(record, where(number), reading, bad, error)
                if value is None:
                    continue
            try:  # the usual case, and the fastest way
                text = value[simple]
                if type(text) is str:
                    texts.append(text)
                    continue
            except (KeyError, TypeError, IndexError):
                pass
            found, problem = fields_of(value, reading)
            # A field that is there has the right name, whatever it holds.
            named = named or problem is None or bool(texts)
            if problem is None:
                text, problem = text_of(found, reading)
            if problem is None:
                texts.append(text)
                continue
            seen += 1
            if isinstance(value, dict) and len(others) < NAMES:
                others |= {name[:NAMES] for name in itertools.islice(value, NAMES)}
            try:
                bad.add(where(number), problem)
            except TooManyBadLines:
                if not named and others and seen >= RECORDS_BEFORE_GIVING_UP:
                    raise _no_field(path, reading, others, problem, seen) from None
                raise
        named = named or bool(texts)
        record, value, text, found = b"", None, "", []  # frees the last one, which may be long
        yield texts
    if not named and others and segment.begin == 0 and segment.end is None:
        raise _no_field(path, reading, others, problem or "")


def _records(
    segment: Segment, chunks: Iterator[Chunk], reading: Reading, bad: BadLines
) -> Iterator[tuple[Callable[[int], str], Records]]:
    """JSON values in blocks, and how messages name them by their numbers.

    An array, or objects over several lines, belong to the file's first range: nobody knows without the
    bytes before it what a byte in them is.
    """
    where = naming(segment)
    if segment.begin:
        if _shape_of_file(segment) == "lines":
            for lines in numbered_lines(segment, chunks, reading, bad):
                yield where, lines
        return
    head, chunks = _peek(chunks)
    if (shape := shape_of(head)) != "lines":
        yield from _cut_out(segment, shape, chunks, reading, bad)
    else:
        for lines in numbered_lines(segment, chunks, reading, bad):
            yield where, lines


def _peek(chunks: Iterator[Chunk]) -> tuple[bytes, Iterator[Chunk]]:
    """The first bytes; and all chunks, these again."""
    first: list[Chunk] = []
    damage: list[UserError] = []
    whole = until_damage(chunks, damage)
    head = b""
    while len(head) < HEAD_BYTES and (chunk := next(whole, None)) is not None:
        first.append(chunk)
        head += chunk[0]

    def again() -> Iterator[Chunk]:
        yield from first
        yield from whole
        if damage:
            raise damage[0]

    return head, again()


def _cut_out(
    segment: Segment, shape: Shape, chunks: Iterator[Chunk], reading: Reading, bad: BadLines
) -> Iterator[tuple[Callable[[int], str], Records]]:
    """The values of an array or the objects over several lines; then, line by line, what follows an
    array."""
    source, limit = segment.source, reading.max_document_bytes
    cut = JsonValues(array=shape == "array", longest=limit)
    damage: list[UserError] = []
    block: list[bytes | None] = []
    number, held = 1, 0

    def where(number: int) -> str:
        return f"{source.path}: value {number}"

    def checked(values: list[bytes | None], first: int) -> list[bytes | None]:
        for n, value in enumerate(values, start=first):
            if value is None:
                bad.add(where(n), f"a value of more than --max-document-bytes {limit:,}")
        return values

    for chunk, _ in until_damage(chunks, damage):
        values, rest = cut.feed(chunk)
        block += checked(values, number + len(block))
        held += len(chunk) + LINE_BYTES * len(values)
        if held >= BLOCK_BYTES or cut.ended:
            after = number + len(block)
            yield where, taken_out(number, block)
            number, block, held = after, [], 0
        if cut.ended:
            rest_of_file = ((data, True) for data, _ in itertools.chain([(rest, True)], chunks))
            for lines in numbered_lines(segment, rest_of_file, reading, bad, cut.newlines):
                yield naming(segment), lines
            return
    count = len(block)  # the reader empties the list
    yield where, taken_out(number, block)
    if damage:
        raise damage[0]
    yield where, taken_out(number + count, cut.close(source))


def _shape_of_file(segment: Segment) -> Shape:
    try:
        return shape_of(read_head(segment.source, HEAD_BYTES))
    except UserError:  # the first range meets it too, and names it
        return "lines"


def _no_field(
    path: str, reading: Reading, others: set[str], problem: str, seen: int | None = None
) -> NoTextField:
    """The error that a field has a wrong name; with `seen`, that so many first records lack it."""
    which = f"{path}: no line" if seen is None else f"{path}: none of the first {seen:,} lines"
    lacks = [name for name in reading.columns if problem == f"no field {name!r}"]
    if not lacks:
        return NoTextField(f"{which} can be used: {problem}")
    more = "more --max-bad-lines, if later lines have it"
    return NoTextField(
        f"{which} has the field {lacks[0]!r}; they have {', '.join(sorted(others)[:20])}: give "
        f"{reading.option_of(lacks[0])} NAME, or {more if seen else 'leave this file out'}"
    )


def _other_json(
    record: bytes, where: str, reading: Reading, bad: BadLines, error: Exception
) -> Any:
    """The value of a record that orjson refuses: with NaN and Infinity, which are no JSON but which
    Python writes; or with text that is not UTF-8, when its field is not used or --invalid-utf8 takes
    it. None: the record cannot be used, and is counted."""
    record = record.removeprefix(codecs.BOM_UTF8)  # of files that were put one behind the other
    replaced = False
    try:
        text = record.decode()
    except UnicodeDecodeError as bad_bytes:
        if not replaces(bad_bytes, where, reading, bad):
            return None
        text, replaced = record.decode(errors="replace"), True
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError) as refused:
        bad.add(where, f"not JSON: {refused if replaced else error}")
        return None
    if replaced:
        bad.replaced += 1
    else:
        found, problem = fields_of(value, reading)
        if problem is None and in_utf8(found, where, reading, bad) is None:
            return None
    return without_surrogates(value)
