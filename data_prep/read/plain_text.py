"""Documents out of plain text."""

from collections.abc import Callable, Iterator

from data_prep.errors import UserError
from data_prep.read.lines import naming, numbered_lines
from data_prep.read.reading import BadLines, Reading, not_utf8
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
    parts: list[bytes] = []
    size = 0
    for chunk, _ in chunks:
        size += len(chunk)
        if size <= limit:
            parts.append(chunk)
        else:
            parts.clear()
    if size > limit:
        hint = "--text-documents paragraph or line cuts it into smaller documents"
        bad.add(path, f"{size:,} bytes, more than --max-document-bytes {limit:,}: {hint}")
        return []
    return list(_decoded(b"".join(parts), lambda: path, reading, bad, marked=True))


def _paragraphs(
    segment: Segment, chunks: Iterator[Chunk], reading: Reading, bad: BadLines
) -> Iterator[list[str]]:
    path, limit = segment.source.path, reading.max_document_bytes
    paragraph: list[bytes] = []
    size = 0

    def ended(after: int) -> list[str]:
        # `after` is the number of the line after the paragraph.
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
    for lines in numbered_lines(segment, chunks, reading, bad):
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


def _lines(
    segment: Segment, chunks: Iterator[Chunk], reading: Reading, bad: BadLines
) -> Iterator[list[str]]:
    where = naming(segment)
    for lines in numbered_lines(segment, chunks, reading, bad):
        yield [
            text
            for number, line in lines
            for text in _decoded(line, lambda n=number: where(n), reading, bad)  # type: ignore[misc]
        ]


def _decoded(
    data: bytes, where: Callable[[], str], reading: Reading, bad: BadLines, marked: bool = False
) -> Iterator[str]:
    try:
        text = data.decode("utf-8-sig" if marked else "utf-8")  # without a byte order mark
    except UnicodeDecodeError as error:
        if reading.invalid_utf8 == "stop":
            raise UserError(not_utf8(where(), error)) from error
        if reading.invalid_utf8 == "skip":
            bad.add(where(), f"not UTF-8: {error.reason} at byte {error.start}")
            return
        text = data.decode(errors="replace").removeprefix("\ufeff")
        bad.replaced += 1
    if "\0" in text:
        bad.add(where(), "holds binary data")
        return
    yield text
