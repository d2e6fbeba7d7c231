"""Megatron's indexed data set: token files that megatron-core memory-maps.

`.bin` holds the tokens of all documents one after another, `.idx` where each begins. The layout of
`.idx`, as in docs/reference/formats.md and as other tools read it:

    MMIDIDX\\0\\0 | u64 version 1 | u8 dtype code | u64 sequences S | u64 documents + 1
    i32[S] lengths | i64[S] byte offsets into .bin | i64[documents + 1] first sequence of each document

all little-endian. Here every document is one sequence.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.errors import UserError

DTYPE_CODES = {"int32": 4, "uint16": 8}
HEADER_BYTES = 34
DOCUMENTS_AT_ONCE = 1 << 20


def token_dtype(vocab_size: int) -> str:
    """uint16 where ids fit it (megatron-core's own limit), else int32."""
    return "uint16" if vocab_size < 65_500 else "int32"


def write_index(path: Path, dtype: str, lengths: list[Path]) -> str:
    """Writes an .idx, durably; returns its SHA-256.

    Memory does not grow with the documents: their lengths are read a million at a time.

    Args:
        lengths: files of i32 document lengths in tokens, in order.
    """
    count = sum(file.stat().st_size for file in lengths) // 4
    width = np.dtype(dtype).itemsize
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: bytes) -> None:
            file.write(data)
            digest.update(data)

        write(b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes())
        write(bytes([DTYPE_CODES[np.dtype(dtype).name]]))
        write(np.array([count, count + 1], "<u8").tobytes())
        for some in _lengths(lengths):
            write(some.tobytes())
        end = 0
        for some in _lengths(lengths):
            ends = end + np.cumsum(some, dtype=np.int64)
            write(((ends - some) * width).astype("<i8").tobytes())
            end = int(ends[-1])
        for first in range(0, count + 1, DOCUMENTS_AT_ONCE):
            last = min(first + DOCUMENTS_AT_ONCE, count + 1)
            write(np.arange(first, last, dtype="<i8").tobytes())
        _durable(file)
    return digest.hexdigest()


def _lengths(files: list[Path]) -> Iterator[np.ndarray]:
    for path in files:
        with path.open("rb") as file:
            while len(some := np.fromfile(file, "<i4", DOCUMENTS_AT_ONCE)):
                yield some


def append_files(target: Path, files: list[Path]) -> None:
    """Joins files, durably. The system copies them; some file systems can share the bytes instead."""
    with target.open("wb") as out:
        for path in files:
            with path.open("rb") as file:
                _append(out, file, path.stat().st_size)
        _durable(out)


def _append(out: BinaryIO, file: BinaryIO, size: int) -> None:
    out.flush()
    done = 0
    try:
        while done < size:
            copied = os.copy_file_range(file.fileno(), out.fileno(), size - done)
            if not copied:
                break
            done += copied
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) == 28:  # no space left
            raise
    out.seek(0, 2)
    if done < size:  # not on this system, or not between these disks
        file.seek(done)
        shutil.copyfileobj(file, out, 1 << 20)


def index_bytes(documents: int) -> int:
    """The size of an .idx."""
    return HEADER_BYTES + 12 * documents + 8 * (documents + 1)


def read_document(prefix: Path, number: int, dtype: str, documents: int) -> np.ndarray:
    """The ids of one document, its EOD included.

    Raises:
        UserError: the index does not say where in .bin it is.
    """
    index = np.memmap(prefix.with_suffix(".idx"), mode="r", dtype=np.uint8)
    start = HEADER_BYTES
    lengths = index[start : start + 4 * documents].view("<i4")
    offsets = index[start + 4 * documents : start + 12 * documents].view("<i8")
    tokens, kind = prefix.with_suffix(".bin"), np.dtype(dtype).newbyteorder("<")
    count, offset = int(lengths[number]), int(offsets[number])
    end = offset + count * kind.itemsize
    if count < 1 or not 0 <= offset < end <= tokens.stat().st_size:
        raise UserError(
            f"{prefix}.idx: document {number:,} is not in {tokens.name}: see `megatron-ladder data verify`"
        )
    return np.fromfile(tokens, dtype=kind, count=count, offset=offset)


def _durable(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
