"""Documents out of files: JSON lines, or plain text."""

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from data_prep.errors import UserError
from data_prep.sources import Source, read_chunks

TextDocuments = Literal["file", "paragraph", "line"]
# A text field that none of this many first lines has is taken for a wrong name.
LINES_BEFORE_GIVING_UP = 10
EXAMPLES = 5


@dataclass
class BadLines:
    """Lines (or whole text files) that are skipped: counted, the first few kept to be shown."""

    limit: int
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, where: str, why: str) -> None:
        """Raises UserError when there are more than `limit`."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{where}: {why}")
        if self.count > self.limit:
            shown = "\n".join(f"  {example}" for example in self.examples)
            raise UserError(
                f"more than --max-bad-lines {self.limit} lines cannot be used; the first ones:\n"
                f"{shown}"
            )


def read_documents(
    source: Source,
    *,
    text_field: str,
    text_documents: TextDocuments,
    bad: BadLines,
    progress: Callable[[int], None],
) -> Iterator[str]:
    """The texts of one file, in order, the empty ones too.

    Args:
        text_field: of a JSON line, the key of its text.
        text_documents: what a document is in a plain text file.
        bad: takes what is not UTF-8, not JSON, not an object, or without text.
        progress: called with bytes read from disk.
    """
    chunks = read_chunks(source, progress)
    if source.kind == "jsonl":
        yield from _json_lines(source, chunks, text_field, bad)
    else:
        yield from _text(source, chunks, text_documents, bad)


def _json_lines(
    source: Source, chunks: Iterator[bytes], text_field: str, bad: BadLines
) -> Iterator[str]:
    good = 0
    without: set[str] = set()
    for number, line in enumerate(_lines(chunks), start=1):
        if not line.strip():
            continue
        where = f"{source.path}:{number}"
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if number == 1 and b"\0" in line:
            raise UserError(f"{source.path} is not JSON lines: it holds binary data")
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            bad.add(where, f"not JSON: {error}")
            continue
        problem = _problem(value, text_field)
        if problem is None:
            good += 1
            yield value[text_field]
            continue
        bad.add(where, problem)
        if isinstance(value, dict) and text_field not in value:
            without |= set(value)
            if not good and number >= LINES_BEFORE_GIVING_UP:
                break
    if not good and without:
        raise UserError(
            f"{source.path}: no line has the text field {text_field!r}; they have "
            f"{', '.join(sorted(without)[:20])}: give --text-field NAME"
        )


def _problem(value: Any, text_field: str) -> str | None:
    if not isinstance(value, dict):
        return "not a JSON object"
    if text_field not in value:
        return f"no field {text_field!r}"
    if not isinstance(value[text_field], str):
        return f"field {text_field!r} is no string"
    return None


def _text(
    source: Source, chunks: Iterator[bytes], text_documents: TextDocuments, bad: BadLines
) -> Iterator[str]:
    def decoded(parts: list[bytes], where: str) -> Iterator[str]:
        try:
            text = b"".join(parts).decode("utf-8-sig")  # without a byte order mark
        except UnicodeDecodeError as error:
            bad.add(where, f"not UTF-8: {error.reason} at byte {error.start}")
            return
        if "\0" in text:
            bad.add(where, "holds binary data")
            return
        yield text

    if text_documents == "file":
        yield from decoded(list(chunks), str(source.path))
        return
    paragraph: list[bytes] = []
    number = 0
    for number, line in enumerate(_lines(chunks), start=1):
        if text_documents == "line":
            yield from decoded([line], f"{source.path}:{number}")
        elif line.strip():
            paragraph.append(line + b"\n")
        elif paragraph:
            yield from decoded(paragraph, f"{source.path}:{number - len(paragraph)}")
            paragraph = []
    if paragraph:
        yield from decoded(paragraph, f"{source.path}:{number + 1 - len(paragraph)}")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their ends."""
    rest: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest.append(first)
        for line in others:
            yield b"".join(rest)
            rest = [line]
    if last := b"".join(rest):
        yield last
