"""Documents out of plain text. A line's end is one character, however the file writes it."""

import codecs
from collections.abc import Callable, Iterator

from data_prep.read.lines import UTF16, UTF16_MARKS, naming, numbered_lines
from data_prep.read.reading import BadLines, Reading, replaces
from data_prep.read.sources import Segment
from data_prep.read.streams import Chunk


def read_plain_text(
    segment: Segment, chunks: Iterator[Chunk], reading: Reading, bad: BadLines
) -> Iterator[list[str]]:
    """The documents, in batches: the whole file, paragraphs between blank lines, or lines."""
    if reading.text_documents == "file":
        yield _whole_file(segment.source.path, chunks, reading, bad)
    elif reading.text_documents == "paragraph":
        yield from _paragraphs(segment, chunks, reading, bad)
    else:
        yield from _lines(segment, chunks, reading, bad)


def _whole_file(path: str, chunks: Iterator[Chunk], reading: Reading, bad: BadLines) -> list[str]:
    """The file as one document; none when it is too long."""
    limit = reading.max_document_bytes
    held = bytearray()
    size = 0
    for chunk, _ in chunks:
        size += len(chunk)
        if size <= limit:
            held += chunk
        else:
            held = bytearray()
    if size > limit:
        hint = "--text-documents paragraph or line cuts it into smaller documents"
        bad.add(path, f"{size:,} bytes, more than --max-document-bytes {limit:,}: {hint}")
        return []
    whole = bytes(held.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n"))
    return list(_decoded(whole, lambda: path, reading, bad))


def _paragraphs(
    segment: Segment, chunks: Iterator[Chunk], reading: Reading, bad: BadLines
) -> Iterator[list[str]]:
    path, limit = segment.source.path, reading.max_document_bytes
    paragraph = bytearray()
    size = count = 0

    def ended(after: int) -> list[str]:
        # `after` is the number of the line after the paragraph.
        first = after - count
        if size > limit:
            bad.add(
                f"{path}:{first}",
                f"a paragraph of {size:,} bytes, more than --max-document-bytes {limit:,}",
            )
            return []
        return list(_decoded(bytes(paragraph), lambda: f"{path}:{first}", reading, bad))

    number = 0
    for lines in numbered_lines(segment, chunks, reading, bad):
        texts: list[str] = []
        for number, line in lines:
            if line.strip():
                line = line.removesuffix(b"\r")
                size += len(line) + 1
                count += 1
                if size <= limit:
                    paragraph += line + b"\n"
                else:
                    paragraph = bytearray()
            elif count:
                texts += ended(number)
                paragraph, size, count = bytearray(), 0, 0
        yield texts
    if count:
        yield ended(number + 1)


def _lines(
    segment: Segment, chunks: Iterator[Chunk], reading: Reading, bad: BadLines
) -> Iterator[list[str]]:
    where = naming(segment)
    for lines in numbered_lines(segment, chunks, reading, bad):
        yield [
            text
            for number, line in lines
            for text in _decoded(
                line.removesuffix(b"\r"),
                lambda n=number: where(n),  # type: ignore[misc]
                reading,
                bad,
            )
        ]


def _decoded(
    data: bytes, where: Callable[[], str], reading: Reading, bad: BadLines
) -> Iterator[str]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if data.startswith(UTF16_MARKS):
            bad.add(where(), UTF16)
            return
        if not replaces(error, where(), reading, bad):
            return
        text = data.decode(errors="replace")
        bad.replaced += 1
    if "\0" in text:
        bad.add(where(), "holds binary data")
        return
    yield text
