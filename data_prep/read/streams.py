"""Bytes of a file or of a range of it, decompressed; and where a file can be cut."""

import bz2
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from data_prep.errors import UserError
from data_prep.read import zstd
from data_prep.read.sources import Source, open_source

MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(re.escape(zstd.MAGIC)),
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
BEHIND_BYTES = 16 << 10  # of what is behind a range, where its last line ends soon

Chunk = tuple[bytes, bool]
"""Bytes, and whether they lie in the range. Those behind it may hold the end of its last line."""


def read_chunks(
    source: Source,
    begin: int,
    end: int | None,
    progress: Callable[[int], None],
    block_bytes: int = 4 << 20,
) -> Iterator[Chunk]:
    """The bytes of a range of the file; then, if the caller goes on, the bytes behind it.

    Args:
        begin, end: offsets in the stored file, in a zstd file those of frames. Files of other
            compressions are read whole. None is the file's end.
        progress: called with the number of bytes of the range read since the last call.
        block_bytes: a remote file is asked for so many at once.

    Raises:
        UserError: the file is not what its name says, is damaged or is cut short.
    """
    with open_source(source, block_bytes) as file:
        if source.compression is None:
            yield from _plain(source, file, begin, end, progress)
        elif source.compression == "zstd":
            if begin:
                file.seek(begin)
            stored = zstd.Stored(file, begin)
            if begin == 0 and (first := stored.peek(16)):
                _check_magic(source, first)
            yield from zstd.unpacked(source.path, stored, end, progress)
        else:
            yield from _members(source, file, progress)


def read_head(source: Source, count: int) -> bytes:
    """The first bytes of a file, decompressed; fewer than `count` if it has fewer.

    Raises:
        UserError: the file is damaged in them.
    """
    if source.compression is None:
        with open_source(source, block_bytes=count) as file:
            return file.read(count)
    head = b""
    for chunk, _ in read_chunks(source, 0, None, lambda _: None, block_bytes=count):
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
        if name == "zstd" and source.compression == name and zstd.skippable(first):
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
    while chunk := file.read(BEHIND_BYTES):
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
