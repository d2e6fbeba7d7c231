"""Documents out of files: JSON, parquet and Arrow rows, or plain text."""

from collections.abc import Callable, Iterator

from data_prep.read.chat import without_nulls
from data_prep.read.json_lines import read_json
from data_prep.read.parquet import read_rows
from data_prep.read.plain_text import read_plain_text
from data_prep.read.reading import BadLines, Reading
from data_prep.read.records import fields_of, in_utf8, text_of
from data_prep.read.sources import Segment, Source
from data_prep.read.streams import read_chunks


def read_segment(
    segment: Segment, reading: Reading, bad: BadLines, progress: Callable[[int], None]
) -> Iterator[list[str]]:
    """The texts of a file or of a range of it, in order, the empty ones too, in batches.

    Args:
        bad: counts what cannot be used: not UTF-8, not JSON, not an object, too long, or without text.
        progress: called with bytes read from disk.
    """
    source = segment.source
    if source.kind in ("parquet", "arrow"):
        yield from _rows(segment, reading, bad, progress)
        return
    chunks = read_chunks(source, segment.begin, segment.end, progress)
    if source.kind == "jsonl":
        yield from read_json(segment, chunks, reading, bad)
    else:
        yield from read_plain_text(segment, chunks, reading, bad)


def read_documents(
    source: Source, reading: Reading, bad: BadLines, progress: Callable[[int], None]
) -> Iterator[str]:
    """The texts of one whole file, in order, the empty ones too."""
    for texts in read_segment(Segment(source, source.bytes), reading, bad, progress):
        yield from texts


def _is_longer(text: str, limit: int) -> bool:
    """Whether it has more bytes of UTF-8. Most texts need not be encoded: a character has at most four."""
    return 4 * len(text) > limit and len(text.encode("utf-8", "surrogatepass")) > limit


def _rows(
    segment: Segment, reading: Reading, bad: BadLines, progress: Callable[[int], None]
) -> Iterator[list[str]]:
    source, number = segment.source, 0
    first = f"row group {segment.begin}, " if segment.begin else ""
    rows = read_rows(source, reading, segment.begin, segment.end, progress)
    for batch in rows:
        texts = []
        for row in batch:
            number += 1
            where = f"{source.path}: {first}row {number}"
            found, problem = fields_of(row, reading)
            text = ""
            if problem is None and (reading.chat or bytes in map(type, found)):
                decoded = in_utf8(found, where, reading, bad)
                if decoded is None:
                    continue
                found = decoded
            if problem is None and reading.chat:
                found = [without_nulls(value) for value in found]
            if problem is None:
                text, problem = text_of(found, reading)
            if problem is None and _is_longer(text, reading.max_document_bytes):
                problem = f"longer than --max-document-bytes {reading.max_document_bytes:,}"
            if problem is not None:
                bad.add(where, problem)
                continue
            texts.append(text)
        yield texts
