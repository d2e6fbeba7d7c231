"""Documents out of files: JSON lines, parquet and Arrow rows, or plain text."""

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from data_prep.errors import UserError
from data_prep.read.chat import Chat, Conversation, pieces_of
from data_prep.read.lines import line_blocks
from data_prep.read.parquet import read_rows
from data_prep.read.sources import Segment, Source
from data_prep.read.streams import Chunk, read_chunks

TextDocuments = Literal["file", "paragraph", "line"]
InvalidUtf8 = Literal["skip", "replace", "stop"]
# A text field that none of this many first lines has is taken for a wrong name.
LINES_BEFORE_GIVING_UP = 10
EXAMPLES = 5


@dataclass(frozen=True)
class Reading:
    """How documents are read out of files."""

    text_field: tuple[str, ...] = ("text",)
    """Of a JSON line or a row, the key of its text, or a path to it (`meta.text`). Several texts are
    joined by an empty line."""
    text_documents: TextDocuments = "file"
    """What a document is in a plain text file."""
    invalid_utf8: InvalidUtf8 = "skip"
    max_document_bytes: int = 16 << 20
    """A longer line, or text file that is one document, cannot be used: it would take too much
    memory."""
    chat: Chat | None = None
    """Documents are conversations, in place of `text_field`."""
    id_field: str | None = None
    """Documents come with what this key holds (`Named`); files of plain text have none."""

    @property
    def fields(self) -> tuple[str, ...]:
        return self.chat.fields if self.chat else self.text_field

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.fields, self.id_field) if self.id_field else self.fields


class Named(str):
    """A text with its document's id."""

    __slots__ = ("name",)
    name: str

    def __new__(cls, text: str, name: str) -> "Named":
        named = super().__new__(cls, text)
        named.name = name
        return named


@dataclass
class BadLines:
    """Lines (or whole text files) that are skipped: counted, the first few kept to be shown."""

    limit: int
    count: int = 0
    examples: list[str] = field(default_factory=list)
    replaced: int = 0
    """Documents in which invalid UTF-8 was replaced."""

    def add(self, where: str, why: str) -> None:
        """Raises UserError when there are more than `limit`."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{where}: {why}")
        self.check()

    def check(self) -> None:
        if self.count > self.limit:
            shown = "\n".join(f"  {example}" for example in self.examples)
            raise TooManyBadLines(
                f"more than --max-bad-lines {self.limit} lines cannot be used; the first ones:\n"
                f"{shown}"
            )


class TooManyBadLines(UserError):
    """Not one file's fault alone: going on with the others would not help."""


class NoTextField(UserError):
    """The same of --text-field."""


def read_segment(
    segment: Segment, reading: Reading, bad: BadLines, progress: Callable[[int], None]
) -> Iterator[list[str]]:
    """The texts of a file or of a range of it, in order, the empty ones too, in batches.

    Args:
        bad: takes what is not UTF-8, not JSON, not an object, too long, or without text.
        progress: called with bytes read from disk.
    """
    source = segment.source
    if source.kind in ("parquet", "arrow"):
        yield from _rows(segment, reading, bad, progress)
        return
    chunks = read_chunks(source, segment.begin, segment.end, progress)
    if source.kind == "jsonl":
        yield from _json_lines(segment, chunks, reading, bad)
    elif reading.text_documents == "line":
        where = _naming(segment)
        for lines in _numbered_lines(segment, chunks, reading, bad):
            yield [
                text
                for number, line in lines
                for text in _decoded(line, lambda n=number: where(n), reading, bad)  # type: ignore[misc]
            ]
    else:
        yield from _text(segment, chunks, reading, bad)


def _rows(
    segment: Segment, reading: Reading, bad: BadLines, progress: Callable[[int], None]
) -> Iterator[list[str]]:
    source, number = segment.source, 0
    first = f"row group {segment.begin}, " if segment.begin else ""
    rows = read_rows(source, reading.columns, segment.begin, segment.end, progress)
    for batch in rows:
        texts = []
        for row in batch:
            number += 1
            text, problem = text_of(row, reading)
            if problem is None and len(text) > reading.max_document_bytes:
                problem = f"longer than --max-document-bytes {reading.max_document_bytes:,}"
            if problem is not None:
                bad.add(f"{source.path}: {first}row {number}", problem)
                continue
            texts.append(text)
        yield texts


def text_of(value: Any, reading: Reading) -> tuple[str, str | None]:
    """The text of a JSON object or a row; and why it has none."""
    if not isinstance(value, dict):
        hint = " (a JSON array? one object a line is needed)" if isinstance(value, list) else ""
        return "", f"not a JSON object{hint}"
    found = []
    for name in reading.columns:
        inner: Any = value
        for key in (name,) if name in value else name.split("."):
            if not isinstance(inner, dict) or key not in inner:
                return "", f"no field {name!r}"
            inner = inner[key]
        found.append(inner)
    identity = found.pop() if reading.id_field else None
    if isinstance(identity, dict | list) or (reading.id_field and identity is None):
        return "", f"field {reading.id_field!r} is no string or number"
    if reading.chat:
        pieces, problem = pieces_of(found, reading.chat)
        return Conversation(pieces), problem
    for name, text in zip(reading.fields, found, strict=True):
        if not isinstance(text, str):
            return "", f"field {name!r} is no string"
    text = found[0] if len(found) == 1 else "\n\n".join(found)
    return (Named(text, str(identity)) if reading.id_field else text), None


def _json_lines(
    segment: Segment, chunks: Iterator[Chunk], reading: Reading, bad: BadLines
) -> Iterator[list[str]]:
    path, good, seen = segment.source.path, 0, 0
    without: set[str] = set()
    problem: str | None = None
    simple = reading.fields[0] if len(reading.columns) == 1 and not reading.chat else None
    where = _naming(segment)
    for lines in _numbered_lines(segment, chunks, reading, bad):
        texts = []
        for number, line in lines:
            try:
                value = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                if not line.strip():
                    continue
                value = _json_with_bad_utf8(line, where(number), reading, bad, error)
            try:  # nearly always
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
        line, value, text = b"", None, ""  # the last may be long
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
    """The value of a line that is no JSON; None when it stays that."""
    try:
        line.decode()
    except UnicodeDecodeError as bad_bytes:
        if reading.invalid_utf8 == "stop":
            raise UserError(_not_utf8(where, bad_bytes)) from bad_bytes
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


def _not_utf8(where: str, error: UnicodeDecodeError) -> str:
    return (
        f"{where}: not UTF-8: {error.reason} at byte {error.start}: give --invalid-utf8 replace or "
        "skip to go on"
    )


def _decoded(
    data: bytes, where: Callable[[], str], reading: Reading, bad: BadLines, marked: bool = False
) -> Iterator[str]:
    try:
        text = data.decode("utf-8-sig" if marked else "utf-8")  # without a byte order mark
    except UnicodeDecodeError as error:
        if reading.invalid_utf8 == "stop":
            raise UserError(_not_utf8(where(), error)) from error
        if reading.invalid_utf8 == "skip":
            bad.add(where(), f"not UTF-8: {error.reason} at byte {error.start}")
            return
        text = data.decode(errors="replace").removeprefix("\ufeff")
        bad.replaced += 1
    if "\0" in text:
        bad.add(where(), "holds binary data")
        return
    yield text


def _text(
    segment: Segment, chunks: Iterator[Chunk], reading: Reading, bad: BadLines
) -> Iterator[list[str]]:
    """Whole files, or paragraphs between blank lines."""
    path = segment.source.path
    limit = reading.max_document_bytes
    if reading.text_documents == "file":
        parts: list[bytes] = []
        size = 0
        for chunk, _ in chunks:
            size += len(chunk)
            if size <= limit:
                parts.append(chunk)
            else:
                parts.clear()
        if size > limit:
            hint = "--text-documents paragraph or line makes more of it"
            bad.add(path, f"{size:,} bytes, more than --max-document-bytes {limit:,}: {hint}")
            return
        yield list(_decoded(b"".join(parts), lambda: path, reading, bad, marked=True))
        return
    paragraph: list[bytes] = []
    size = 0

    def ended(after: int) -> list[str]:
        # `after` is the number of the line behind the paragraph.
        first = after - len(paragraph)
        if size > limit:
            bad.add(
                f"{path}:{first}",
                f"a paragraph of {size:,} bytes, more than --max-document-bytes {limit:,}",
            )
            return []
        data = b"".join(paragraph)
        return list(_decoded(data, lambda: f"{path}:{first}", reading, bad, marked=first == 1))

    number = 0
    for lines in _numbered_lines(segment, chunks, reading, bad):
        texts: list[str] = []
        for number, line in lines:
            if line.strip():
                size += len(line) + 1
                paragraph.append(line + b"\n" if size <= limit else b"")
            elif paragraph:
                texts += ended(number)
                paragraph, size = [], 0
        yield texts
    if paragraph:
        yield ended(number + 1)


def _naming(segment: Segment) -> Callable[[int], str]:
    """Names a line by its number."""
    after = f", counted from byte {segment.begin:,}" if segment.begin else ""
    return lambda number: f"{segment.source.path}:{number}{after}"


def _numbered_lines(
    segment: Segment, chunks: Iterator[Chunk], reading: Reading, bad: BadLines
) -> Iterator[Iterator[tuple[int, bytes]]]:
    """Lines with their numbers, in blocks; without those that are too long."""
    where, limit = _naming(segment), reading.max_document_bytes
    for first, lines in line_blocks(chunks, inside=segment.begin > 0, longest=limit):
        if first == 1 and not segment.begin and lines and lines[0] is not None:
            if segment.source.kind == "jsonl" and b"\0" in lines[0]:
                raise UserError(f"{segment.source.path} is not JSON lines: it holds binary data")
            lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
        for number, line in enumerate(lines, start=first):
            if line is None:
                bad.add(where(number), f"a line of more than --max-document-bytes {limit:,}")
        yield _taken_out(first, lines)


def _taken_out(first: int, lines: list[bytes | None]) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers; each can be freed as soon as it has been used."""
    lines.reverse()
    while lines:
        if (line := lines.pop()) is not None:
            yield first, line
        first += 1


def read_documents(
    source: Source, reading: Reading, bad: BadLines, progress: Callable[[int], None]
) -> Iterator[str]:
    """The texts of one whole file, in order, the empty ones too."""
    for texts in read_segment(Segment(source, source.bytes), reading, bad, progress):
        yield from texts
