"""Finds the parts of what `torch.save` writes: a zip archive whose members are not compressed."""

import struct
from dataclasses import dataclass
from typing import BinaryIO

from megatron_ladder.reading.plain_files import NotData

# Of the list of members: a tensor has 7 members, and this is enough for 10,000.
_LARGEST_LIST = 2**20
_END, _END_64, _LOCATOR = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_MEMBER, _LOCAL = b"PK\1\2", b"PK\3\4"
_FULL = 0xFFFFFFFF


@dataclass(frozen=True)
class Archive:
    """An archive in a file: its members by name, without the folder that torch puts them in."""

    file: BinaryIO
    begin: int
    """Where the archive begins in the file, in bytes."""
    length: int
    members: dict[str, tuple[int, int]]
    """Where a member's header begins in the archive, and the size of its content, in bytes."""

    def place(self, name: str) -> tuple[int, int]:
        """Where the content of a member is in the file, and its size, both in bytes.

        Raises:
            NotData: there is no such member, or it does not lie in the archive.
        """
        if name not in self.members:
            raise NotData(f"has no part {name[:40]!r}")
        at, size = self.members[name]
        header = read_bytes(self.file, self.begin + at, 30) if at + 30 <= self.length else b""
        if header[:4] != _LOCAL:
            raise NotData("is not an archive as torch.save writes it")
        at += 30 + sum(struct.unpack("<HH", header[26:30]))
        if at + size > self.length:
            raise NotData("has a part that is longer than the archive")
        return self.begin + at, size

    def read(self, name: str) -> bytes:
        """The content of a member. Raises NotData as `place`."""
        return read_bytes(self.file, *self.place(name))


def read_bytes(file: BinaryIO, at: int, size: int) -> bytes:
    """Bytes of a file. Raises NotData when it is too short."""
    file.seek(at)
    if len(found := file.read(size)) != size:
        raise NotData("ends too early")
    return found


def open_archive(file: BinaryIO, begin: int, length: int) -> Archive:
    """Reads an archive's list of members. No member is larger than the archive, for none is compressed.

    Args:
        begin, length: the archive's place in the file, in bytes; the caller has compared it with the
            file's size.

    Raises:
        NotData: it is not an archive as torch.save writes it.
    """
    try:
        return Archive(file, begin, length, _members(file, begin, length))
    except NotData:
        raise
    except (struct.error, ValueError) as error:
        raise NotData("is not an archive as torch.save writes it") from error


def _members(file: BinaryIO, begin: int, length: int) -> dict[str, tuple[int, int]]:
    if length < 22:
        raise ValueError
    end = read_bytes(file, begin + length - 22, 22)
    *_, size, start, comment = struct.unpack("<4sHHHHIIH", end)
    if end[:4] != _END or comment:
        raise ValueError
    if size == _FULL or start == _FULL or end[10:12] == b"\xff\xff":  # larger than 4 GB
        size, start = _large(file, begin, length)
    if size > _LARGEST_LIST or start + size > length:
        raise ValueError
    members: dict[str, tuple[int, int]] = {}
    listed, at = read_bytes(file, begin + start, size), 0
    while at < size:
        kind, method, packed, unpacked, name_size, extra_size, note_size, place = struct.unpack(
            "<4s6xH8xIIHHH8xI", listed[at : at + 46]
        )
        at += 46
        name = listed[at : at + name_size].decode()
        extra = listed[at + name_size : at + name_size + extra_size]
        if _FULL in (packed, unpacked, place):
            unpacked, packed, place = _large_member(extra, unpacked, packed, place)
        at += name_size + extra_size + note_size
        # torch puts all members into a folder, which it names after the file.
        name = name.partition("/")[2]
        if kind != _MEMBER or method or packed != unpacked or unpacked > length or name in members:
            raise ValueError
        members[name] = place, unpacked
    return members


def _large(file: BinaryIO, begin: int, length: int) -> tuple[int, int]:
    """Size and place of the list of members in an archive of more than 4 GB."""
    if length < 22 + 20:
        raise ValueError
    mark, place = struct.unpack("<4s4xQ4x", read_bytes(file, begin + length - 42, 20))
    if mark != _LOCATOR or place + 56 > length:
        raise ValueError
    mark, size, start = struct.unpack("<4s36xQQ", read_bytes(file, begin + place, 56))
    if mark != _END_64:
        raise ValueError
    return size, start


def _large_member(extra: bytes, *sizes: int) -> tuple[int, int, int]:
    """A member's size, packed size and place. Those above 4 GB stand in the field with number 1."""
    at = 0
    while at < len(extra):
        number, size = struct.unpack("<HH", extra[at : at + 4])
        if number == 1:
            large = iter(struct.unpack(f"<{size // 8}Q", extra[at + 4 : at + 4 + size // 8 * 8]))
            first, second, third = (next(large, -1) if x == _FULL else x for x in sizes)
            if min(first, second, third) < 0:
                raise ValueError
            return first, second, third
        at += 4 + size
    raise ValueError
