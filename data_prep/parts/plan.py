"""Cuts the input into parts. Any process on any machine can work through any part.

The cuts depend only on the files, not on the number of processes or machines: so the output is always
the same.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from data_prep.errors import UserError
from data_prep.read.parquet import row_groups
from data_prep.read.reading import TextDocuments
from data_prep.read.sources import Segment, Source
from data_prep.read.zstd import zstd_frames

# At most a few thousand parts, so that their folder stays small. Parts of a small input are small, so
# that a laptop's cores can share it. Memory does not depend on a part's size.
MOST_PARTS = 4096
SMALLEST_BYTES, LARGEST_BYTES = 16 << 20, 4 << 30


@dataclass(frozen=True)
class Part:
    """Segments that are worked through together, in the order of the input."""

    number: int
    segments: tuple[Segment, ...]

    def key(self, fingerprint: str) -> str:
        """A name made of all that decides the part's output: the same name, the same output."""
        facts = json.dumps([fingerprint, [asdict(s) for s in self.segments]], sort_keys=True)
        return hashlib.blake2b(facts.encode(), digest_size=12).hexdigest()

    @property
    def bytes(self) -> int:
        return sum(segment.bytes for segment in self.segments)


def part_bytes(sources: list[Source]) -> int:
    total = sum(source.bytes for source in sources)
    return min(max(total // MOST_PARTS, SMALLEST_BYTES), LARGEST_BYTES)


def plan_parts(
    sources: list[Source], text_documents: TextDocuments, size: int | None = None
) -> list[Part]:
    """Cuts all files into consecutive parts of about `size` bytes (None: by the input's size)."""
    size = size or part_bytes(sources)
    parts: list[Part] = []
    gathered: list[Segment] = []
    filled = 0
    for source in sources:
        for segment in _cut(source, text_documents, size):
            if gathered and filled + segment.bytes > size:
                parts.append(Part(len(parts), tuple(gathered)))
                gathered, filled = [], 0
            gathered.append(segment)
            filled += segment.bytes
    if gathered:
        parts.append(Part(len(parts), tuple(gathered)))
    return parts


def _cut(source: Source, text_documents: TextDocuments, size: int) -> Iterator[Segment]:
    by_line = source.kind == "jsonl" or (source.kind == "text" and text_documents == "line")
    cuts: Iterable[int] = ()
    if source.bytes > size and source.seekable:
        try:
            if source.kind == "parquet":
                yield from _row_groups(source, size)
                return
            if by_line and source.compression is None:
                cuts = range(size, source.bytes, size)
            elif by_line and source.compression == "zstd" and not source.remote:
                cuts = _spaced(zstd_frames(source.path), size)
        except (UserError, OSError):
            pass  # a damaged file is left in one piece; the error is reported when it is read
    begin = 0
    for cut in cuts:
        yield Segment(source, cut - begin, begin, cut)
        begin = cut
    yield Segment(source, source.bytes - begin, begin, None)


def _spaced(offsets: list[int], size: int) -> Iterator[int]:
    last = 0
    for offset in offsets:
        if offset - last >= size:
            yield offset
            last = offset


def _row_groups(source: Source, size: int) -> Iterator[Segment]:
    begin, filled = 0, 0
    groups = row_groups(source)  # before the first segment is yielded: the file may be damaged
    for number, weight in enumerate(groups):
        if filled and filled + weight > size:
            yield Segment(source, filled, begin, number)
            begin, filled = number, 0
        filled += weight
    yield Segment(source, filled, begin, len(groups))


def check_tiling(parts: list[Part]) -> None:
    """Refuses parts that leave out a range of a file, or take one twice.

    Raises:
        UserError: naming the file and the place.
    """
    last: Segment | None = None
    for part in parts:
        for segment in part.segments:
            if last is not None and last.source.path == segment.source.path:
                if last.end != segment.begin:
                    what = "left out" if (last.end or 0) < segment.begin else "taken twice"
                    raise UserError(
                        f"the parts do not fit: {segment.source.path} is {what} between "
                        f"{last.end} and {segment.begin}"
                    )
            else:
                _check_ends(last)
                if segment.begin:
                    raise UserError(
                        f"the parts do not fit: {segment.source.path} is left out up to "
                        f"{segment.begin}"
                    )
            last = segment
    _check_ends(last)


def _check_ends(last: Segment | None) -> None:
    if last is not None and last.end is not None and last.source.kind != "parquet":
        raise UserError(f"the parts do not fit: {last.source.path} is left out from {last.end} on")


def to_json(parts: list[Part], sources: list[Source]) -> list[list[list[Any]]]:
    """Parts as lists of [place of the source, bytes, begin, end]."""
    places = {source.path: place for place, source in enumerate(sources)}
    return [
        [[places[s.source.path], s.bytes, s.begin, s.end] for s in part.segments] for part in parts
    ]


def from_json(parts: list[list[list[Any]]], sources: list[Source]) -> list[Part]:
    """The reverse of `to_json`."""
    return [
        Part(n, tuple(Segment(sources[place], *rest) for place, *rest in segments))
        for n, segments in enumerate(parts)
    ]
