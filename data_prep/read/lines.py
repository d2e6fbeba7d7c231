"""Cuts the bytes of a file, or of a range of it, into lines."""

import codecs
from collections.abc import Callable, Iterator

from data_prep.errors import UserError
from data_prep.read.reading import BadLines, Reading
from data_prep.read.sources import Segment
from data_prep.read.streams import Chunk

# Lines are handed on in blocks of about this many bytes.
BLOCK_BYTES = 2 << 20
# What a line takes in memory beside its bytes: a megabyte may be a million lines.
LINE_BYTES = 64
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
UTF16 = "it is UTF-16: write it as UTF-8 (iconv -f UTF-16 -t UTF-8)"


def line_blocks(
    chunks: Iterator[Chunk], *, inside: bool, longest: int, block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[int, list[bytes | None]]]:
    """Lines without their ends, in blocks, with the number of a block's first line, from 1.

    A line belongs to the range that holds the byte before the line; the file's first line belongs
    to the first range. So each line is in exactly one range, wherever the file is cut.

    Args:
        chunks: bytes, and whether they lie in the range; first those in it, then those behind it.
        inside: the range begins inside the file: the range before has its bytes up to a line's end.
        longest: a line of more bytes becomes None, and is not held in memory.
    """
    lines: list[bytes | None] = []
    rest = bytearray()  # of the line that has not ended yet; it may come in very small chunks
    rest_bytes = held = 0
    first = 1
    damage: list[UserError] = []
    for chunk, owned in until_damage(chunks, damage):
        if not owned:
            if inside:  # no line begins in the range
                return
            end = chunk.find(b"\n") + 1
            done, chunk = bool(end), chunk[: end or None]
        else:
            done = False
        if inside:
            end = chunk.find(b"\n") + 1
            if not end:
                continue
            inside, chunk = False, chunk[end:]
        head, *others = chunk.split(b"\n")
        rest_bytes += len(head)
        if rest_bytes <= longest:
            rest += head
        else:
            rest = bytearray()
        if others:
            lines.append(bytes(rest) if rest_bytes <= longest else None)
            held += rest_bytes + LINE_BYTES * len(others)
            *whole, tail = others
            lines += [line if len(line) <= longest else None for line in whole]
            held += len(chunk) - len(head)
            rest, rest_bytes = bytearray(tail), len(tail)
        if done:
            break
        if held >= block_bytes:
            after = first + len(lines)  # counted now: the reader empties the list
            yield first, lines
            first, lines, held = after, [], 0
    else:
        if rest_bytes and not inside and not damage:
            lines.append(bytes(rest) if rest_bytes <= longest else None)
    if lines:
        yield first, lines
    if damage:
        raise damage[0]


def until_damage(chunks: Iterator[Chunk], damage: list[UserError]) -> Iterator[Chunk]:
    """The chunks up to an error. It goes to `damage`, so that the lines before it are handed on."""
    try:
        yield from chunks
    except UserError as error:
        damage.append(error)


def naming(segment: Segment) -> Callable[[int], str]:
    """How messages name a line of the segment, by its number."""
    after = f", counted from byte {segment.begin:,}" if segment.begin else ""
    return lambda number: f"{segment.source.path}:{number}{after}"


def numbered_lines(
    segment: Segment, chunks: Iterator[Chunk], reading: Reading, bad: BadLines, before: int = 0
) -> Iterator[Iterator[tuple[int, bytes]]]:
    """Lines with their numbers, in blocks; without those that are too long.

    Args:
        before: lines of the file before the chunks.
    """
    where, limit = naming(segment), reading.max_document_bytes
    for first, lines in line_blocks(chunks, inside=segment.begin > 0, longest=limit):
        if first == 1 and not before and not segment.begin and lines and lines[0] is not None:
            if segment.source.kind == "jsonl" and b"\0" in lines[0]:
                what = UTF16 if lines[0].startswith(UTF16_MARKS) else "it holds binary data"
                raise UserError(f"{segment.source.path} is not JSON lines: {what}")
            lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
        for number, line in enumerate(lines, start=first + before):
            if line is None:
                bad.add(where(number), f"a line of more than --max-document-bytes {limit:,}")
        yield taken_out(first + before, lines)


def taken_out(first: int, lines: list[bytes | None]) -> Iterator[tuple[int, bytes]]:
    """Takes lines out of the list, with their numbers, so that each is freed after its use."""
    lines.reverse()
    while lines:
        if (line := lines.pop()) is not None:
            yield first, line
        first += 1
