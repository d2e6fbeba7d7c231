"""Which files to read, and their bytes, decompressed."""

import fnmatch
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import zstandard

from data_prep.errors import UserError

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
KINDS: dict[str, Literal["jsonl", "text"]] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
}
MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: Path
    kind: Literal["jsonl", "text"]
    compression: str | None
    """None, gzip or zstd."""

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size


def find_sources(
    inputs: tuple[Path, ...], include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> list[Source]:
    """The input files, in a fixed order.

    Args:
        inputs: files, or folders searched recursively.
        include: file name patterns to take from folders, read as plain text when their ending is
            not a known one; empty takes the known endings (.jsonl, .json, .txt, .text, with .gz or
            .zst).
        exclude: patterns of whole paths to leave out of folders.

    Raises:
        UserError: an input does not exist, or nothing is left.
    """
    if not inputs:
        raise UserError(
            "no input: give files or folders (before --include, which takes what follows)"
        )
    found: list[Source] = []
    for given in inputs:
        if given.is_dir():
            found += _in_folder(given, include, exclude)
        elif given.is_file():
            found.append(_source(given))
        else:
            raise UserError(f"input {given} does not exist")
    if found and not sum(source.bytes for source in found):
        raise UserError(f"all {len(found)} input files are empty, {found[0].path} among them")
    return found


def _in_folder(folder: Path, include: tuple[str, ...], exclude: tuple[str, ...]) -> list[Source]:
    known = tuple(f"*{kind}{packed}" for kind in KINDS for packed in ("", *COMPRESSION))
    patterns = include or known
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
        and not any(fnmatch.fnmatch(str(path), pattern) for pattern in exclude)
        and path.is_file()
    ]
    if not files:
        raise UserError(
            f"folder {folder} holds no file named like {', '.join(patterns)}: give --include PATTERN"
        )
    return [_source(path) for path in files]


def _source(path: Path) -> Source:
    compression = COMPRESSION.get(path.suffix)
    inner = path.with_suffix("").suffix if compression else path.suffix
    return Source(path, KINDS.get(inner, "text"), compression)


def read_chunks(source: Source, progress: Callable[[int], None]) -> Iterator[bytes]:
    """The file's bytes, decompressed, a chunk at a time.

    Args:
        progress: called with the number of bytes read from disk since the last call.

    Raises:
        UserError: the file is not what its name says, is damaged or is cut short.
    """
    with source.path.open("rb") as file:
        first = file.peek(4)[:4]
        for name, magic in MAGIC.items():
            if first.startswith(magic) != (source.compression == name) and first:
                what = f"is {name} data" if first.startswith(magic) else f"is not {name} data"
                raise UserError(f"{source.path} {what}, which its name does not say: rename it")
        decompressor = _decompressor(source.compression)
        at_end = False
        while chunk := file.read(CHUNK_BYTES):
            progress(len(chunk))
            while chunk:
                if decompressor is None:
                    yield chunk
                    break
                try:
                    data = decompressor.decompress(chunk)
                except (zlib.error, zstandard.ZstdError) as error:
                    raise UserError(f"{source.path} is damaged: {error}") from error
                if data:
                    yield data
                chunk = b""
                if decompressor.eof:  # another member or frame may follow
                    chunk, decompressor = (
                        decompressor.unused_data,
                        _decompressor(source.compression),
                    )
                    at_end = not chunk
                else:
                    at_end = False
        if decompressor is not None and not at_end:
            raise UserError(f"{source.path} is cut short: its {source.compression} data has no end")


def _decompressor(compression: str | None):  # type: ignore[no-untyped-def]
    if compression == "gzip":
        return zlib.decompressobj(wbits=31)  # 31: gzip with its header and checksum
    if compression == "zstd":
        return zstandard.ZstdDecompressor().decompressobj()
    return None
