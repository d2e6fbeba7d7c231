"""Bytes of a file or of a range of it, decompressed; and where a file can be cut."""

import bz2
import lzma
import mmap
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from data_prep.errors import UserError
from data_prep.read.sources import Source, open_source

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(re.escape(ZSTD_MAGIC)),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
}
# A file may be several of these, one after another.
DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=31),  # 31: gzip with its header and checksum
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
}
CHUNK_BYTES = 1 << 20
# Bytes may decompress to a thousand times as many, so the decompressor gets few at once.
COMPRESSED_BYTES = 16 << 10
ZSTD_SKIPPABLE = range(0x184D2A50, 0x184D2A60)

Chunk = tuple[bytes, bool]
"""Bytes, and whether they lie in the range. Those behind it may hold the end of its last line."""


def read_chunks(
    source: Source, begin: int, end: int | None, progress: Callable[[int], None]
) -> Iterator[Chunk]:
    """The bytes of a range of the file; then, if the caller goes on, the bytes behind it.

    Args:
        begin, end: offsets in the stored file, in a zstd file those of frames. Files of other
            compressions are read whole. None is the file's end.
        progress: called with the number of bytes of the range read since the last call.

    Raises:
        UserError: the file is not what its name says, is damaged or is cut short.
    """
    with open_source(source) as file:
        if source.compression is None:
            yield from _plain(source, file, begin, end, progress)
        elif source.compression == "zstd":
            yield from _zstd(source, file, begin, end, progress)
        else:
            yield from _members(source, file, progress)


def read_head(source: Source, count: int) -> bytes:
    """The first bytes of a file, decompressed; fewer than `count` if it has fewer.

    Raises:
        UserError: the file is damaged in them.
    """
    head = b""
    with open_source(source, block_bytes=count) as file:
        if source.compression is None:
            return file.read(count)
        chunks = (
            _zstd(source, file, 0, None, lambda _: None)
            if source.compression == "zstd"
            else _members(source, file, lambda _: None)
        )
        for chunk, _ in chunks:
            head += chunk
            if len(head) >= count:
                break
    return head[:count]


def _check_magic(source: Source, first: bytes) -> None:
    """Refuses a file whose first bytes are not what its name says.

    The caller gives them, as some files cannot be read twice.
    """
    for name, magic in MAGIC.items():
        found = magic.match(first) is not None
        if found == (source.compression == name):
            continue
        if name == "zstd" and source.compression == name and _skippable(first):
            continue
        what = f"is {name} data" if found else f"is not {name} data"
        raise UserError(f"{source.path} {what}, which its name does not say: rename it")


def _plain(
    source: Source, file: BinaryIO, begin: int, end: int | None, progress: Callable[[int], None]
) -> Iterator[Chunk]:
    if begin:
        file.seek(begin)
    position = begin
    while end is None or position < end:
        chunk = file.read(CHUNK_BYTES if end is None else min(CHUNK_BYTES, end - position))
        if not chunk:
            return
        if position == 0:
            _check_magic(source, chunk)
        position += len(chunk)
        progress(len(chunk))
        yield chunk, True
    while chunk := file.read(COMPRESSED_BYTES):
        yield chunk, False


def _members(source: Source, file: BinaryIO, progress: Callable[[int], None]) -> Iterator[Chunk]:
    """Of a gzip, bzip2 or xz file. Zeros may follow each member: tapes and block devices fill up with
    them, and xz pads with them."""
    assert source.compression is not None
    new = DECOMPRESSORS[source.compression]
    decompressor = new()
    at_end = True  # an empty file is whole
    first = True
    while chunk := file.read(CHUNK_BYTES):
        if first:
            _check_magic(source, chunk)
        progress(len(chunk))
        if at_end and not first:
            chunk = chunk.lstrip(b"\0")
        first = False
        # zlib hands back what it has not taken in; the others keep it, and want no input then.
        while chunk or not getattr(decompressor, "needs_input", True):
            at_end = False
            try:
                data = decompressor.decompress(chunk, CHUNK_BYTES)
            except (zlib.error, OSError, lzma.LZMAError) as error:
                raise UserError(f"{source.path} is damaged: {error}") from error
            if data:
                yield data, True
            chunk = getattr(decompressor, "unconsumed_tail", b"")
            if decompressor.eof:  # another member may follow
                chunk, decompressor = decompressor.unused_data.lstrip(b"\0"), new()
                at_end = not chunk
    if not at_end:
        raise UserError(f"{source.path} is cut short: its {source.compression} data has no end")


def _zstd(
    source: Source, file: BinaryIO, begin: int, end: int | None, progress: Callable[[int], None]
) -> Iterator[Chunk]:
    # --long frames need windows of up to 2 GB; memory is taken only as a frame asks for it.
    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    if begin:
        file.seek(begin)
    position, frame_begin = begin, begin
    decompressor: Any = None
    buffer = b""
    while True:
        if not buffer:
            buffer = file.read(COMPRESSED_BYTES)
            if not buffer:
                break
            if position == 0:
                _check_magic(source, buffer)
            position += len(buffer)
            if end is None or position <= end:
                progress(len(buffer))
        if decompressor is None:
            buffer = _after_skippable(source, file, buffer)
            position = file.tell()
            if not buffer:
                continue
            frame_begin = position - len(buffer)
            decompressor = context.decompressobj()
        try:
            data = decompressor.decompress(buffer)
        except zstandard.ZstdError as error:
            raise UserError(f"{source.path} is damaged: {error}") from error
        if data:
            yield data, end is None or frame_begin < end
        buffer = b""
        if decompressor.eof:
            buffer, decompressor = decompressor.unused_data, None
    if decompressor is not None:
        raise UserError(f"{source.path} is cut short: its zstd data has no end")


def _after_skippable(source: Source, file: BinaryIO, buffer: bytes) -> bytes:
    """Skips a frame without text, if `buffer` begins with one (a "skippable frame" in zstd's words)."""
    while len(buffer) < 8 and (more := file.read(8 - len(buffer))):
        buffer += more
    if not _skippable(buffer):
        return buffer
    length = 8 + int.from_bytes(buffer[4:8], "little")
    if length > len(buffer):
        rest = length - len(buffer)
        while rest and (skipped := file.read(min(rest, CHUNK_BYTES))):
            rest -= len(skipped)
        if rest:
            raise UserError(f"{source.path} is cut short: its zstd data has no end")
    return buffer[length:]


def _skippable(data: bytes) -> bool:
    return int.from_bytes(data[:4], "little") in ZSTD_SKIPPABLE


def zstd_frames(path: str) -> list[int]:
    """Offsets of the frames of a local file. Headers are read, and none of the data.

    Raises:
        UserError: the file is damaged or cut short.
    """
    offsets = []
    with Path(path).open("rb") as file:
        if not file.seek(0, 2):
            return []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            at = 0
            while at < len(data):
                magic = int.from_bytes(data[at : at + 4], "little")
                if magic in ZSTD_SKIPPABLE:
                    at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
                else:
                    if data[at : at + 4] != ZSTD_MAGIC:
                        raise UserError(f"{path} is damaged: no zstd frame begins at byte {at}")
                    offsets.append(at)
                    at = _frame_end(data, at + 4)
                if at > len(data):
                    raise UserError(f"{path} is cut short: its zstd data has no end")
    return offsets


def _frame_end(data: mmap.mmap, at: int) -> int:
    """The end of the frame whose descriptor is at `at` (RFC 8878, 3.1.1)."""
    if at >= len(data):
        return len(data) + 1
    descriptor = data[at]
    single, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    at += 1 + (1 - single) + (0, 1, 2, 4)[descriptor & 3] + (single, 2, 4, 8)[descriptor >> 6]
    last = False
    while not last:
        if at + 3 > len(data):
            return len(data) + 1
        header = int.from_bytes(data[at : at + 3], "little")
        last = bool(header & 1)
        at += 3 + (1 if header >> 1 & 3 == 1 else header >> 3)
    return at + 4 * checksum
