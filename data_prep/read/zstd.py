"""zstd files: their frames, and what these hold in pieces that are small however far the file expands."""

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from data_prep.errors import UserError

MAGIC = b"\x28\xb5\x2f\xfd"
SKIPPABLE = range(0x184D2A50, 0x184D2A60)
# A frame is cut into blocks, each of at most so many bytes of text (RFC 8878, 3.1.1.2).
BLOCK_BYTES = 128 << 10
PIECE_BYTES = 1 << 20
READ_BYTES = 16 << 10


class Stored:
    """The bytes of a file from its present place on. They may be looked at before they are taken."""

    def __init__(self, file: BinaryIO, position: int) -> None:
        self._file = file
        self._buffer = b""
        self._at = 0
        self.position = position
        """Where in the file the next byte is."""

    def peek(self, count: int) -> bytes:
        """The next bytes; fewer at the file's end."""
        while len(self._buffer) - self._at < count and (more := self._file.read(READ_BYTES)):
            self._buffer, self._at = self._buffer[self._at :] + more, 0
        return self._buffer[self._at : self._at + count]

    def take(self, count: int) -> bytes:
        data = self.peek(count)
        self._at += len(data)
        self.position += len(data)
        return data

    def skip(self, count: int) -> int:
        """Returns how many bytes were there."""
        skipped = 0
        while skipped < count and (data := self.take(min(READ_BYTES, count - skipped))):
            skipped += len(data)
        return skipped


def unpacked(
    path: str, stored: Stored, end: int | None, progress: Callable[[int], None]
) -> Iterator[tuple[bytes, bool]]:
    """What the frames hold, about a megabyte at a time; and whether the frame begins before `end`.

    A few bytes may stand for 128 kB of text, and 16 kB for half a gigabyte. So blocks are counted before
    they are decompressed.

    Raises:
        UserError: the file is damaged or cut short.
    """
    # --long frames need windows of up to 2 GB; memory is taken only as a frame asks for it.
    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    while first := stored.peek(8):
        frame_begin = stored.position
        if skippable(first):
            length = 8 + int.from_bytes(first[4:8], "little")
            if len(first) < 8 or stored.skip(length) < length:
                raise _cut_short(path)
            continue
        owned = end is None or frame_begin < end
        decompressor = context.decompressobj()
        for piece in _pieces(path, stored):
            try:
                data = decompressor.decompress(piece)
            except zstandard.ZstdError as error:
                raise UserError(f"{path} is damaged: {error}") from error
            if owned:
                progress(len(piece))
            if data:
                yield data, owned
        if not decompressor.eof:
            raise _cut_short(path)


def _pieces(path: str, stored: Stored) -> Iterator[bytes]:
    """The bytes of one frame, in pieces that hold about `PIECE_BYTES` of text at most."""
    head = stored.peek(5)
    if head[:4] != MAGIC:
        raise UserError(f"{path} is damaged: no zstd frame begins at byte {stored.position}")
    if len(head) < 5:
        return
    descriptor = head[4]
    piece = [stored.take(4 + header_bytes(descriptor))]
    text, last = 0, False
    while not last:
        header = stored.take(3)
        last, size, most = block(header)
        piece += [header, stored.take(size)]
        last = last or len(header) < 3
        if last and descriptor >> 2 & 1:
            piece.append(stored.take(4))  # a checksum
        text += most
        if last or text >= PIECE_BYTES:
            yield b"".join(piece)
            piece, text = [], 0


def header_bytes(descriptor: int) -> int:
    """Of a frame's header, the first byte of it included (RFC 8878, 3.1.1)."""
    single = descriptor >> 5 & 1
    return 1 + (1 - single) + (0, 1, 2, 4)[descriptor & 3] + (single, 2, 4, 8)[descriptor >> 6]


def block(header: bytes) -> tuple[bool, int, int]:
    """Of a block: whether it is the last one, its stored bytes behind the header, and its text at most."""
    value = int.from_bytes(header, "little")
    last, kind, size = bool(value & 1), value >> 1 & 3, value >> 3
    return last, 1 if kind == 1 else size, size if kind < 2 else BLOCK_BYTES


def skippable(data: bytes) -> bool:
    """Whether a frame without text begins here (a "skippable frame" in zstd's words)."""
    return int.from_bytes(data[:4], "little") in SKIPPABLE


def _cut_short(path: str) -> UserError:
    return UserError(f"{path} is cut short: its zstd data has no end")


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
                if magic in SKIPPABLE:
                    at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
                else:
                    if data[at : at + 4] != MAGIC:
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
    at += header_bytes(descriptor)
    last = False
    while not last:
        if at + 3 > len(data):
            return len(data) + 1
        last, size, _ = block(data[at : at + 3])
        at += 3 + size
    return at + 4 * (descriptor >> 2 & 1)
