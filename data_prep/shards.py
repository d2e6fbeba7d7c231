"""Megatron's indexed data set: token files that megatron-core memory-maps.

`.bin` holds the tokens of all documents one after another, `.idx` where each begins; docs/formats.md
and shared tools' readers agree on:

    MMIDIDX\\0\\0 | u64 version 1 | u8 dtype code | u64 sequences S | u64 documents + 1
    i32[S] lengths | i64[S] byte offsets into .bin | i64[documents + 1] first sequence of each document

all little-endian. Here every document is one sequence.
"""

import os
from array import array
from pathlib import Path

import numpy as np

DTYPE_CODES = {"int32": 4, "uint16": 8}


def token_dtype(vocab_size: int) -> str:
    """uint16 where ids fit it (megatron-core's own limit), else int32."""
    return "uint16" if vocab_size < 65_500 else "int32"


class ShardWriter:
    """Writes PREFIX.bin as documents come, and PREFIX.idx at the end.

    Memory grows by four bytes a document.
    """

    def __init__(self, prefix: Path, dtype: str) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._bin = prefix.with_suffix(".bin").open("wb")
        self._lengths = array("i")
        self.tokens = 0
        self.text_bytes = 0

    @property
    def documents(self) -> int:
        return len(self._lengths)

    def add(self, ids: list[int], text_bytes: int) -> None:
        """Appends one document, its EOD id included."""
        self._bin.write(np.array(ids, dtype=self._dtype).tobytes())
        self._lengths.append(len(ids))
        self.tokens += len(ids)
        self.text_bytes += text_bytes

    def close(self) -> dict[str, int]:
        """Writes the index and makes both files durable; returns the manifest's figures."""
        lengths = np.frombuffer(self._lengths, dtype=np.int32).astype("<i4")
        offsets = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        offsets *= self._dtype.itemsize
        index = self._prefix.with_suffix(".idx")
        with index.open("wb") as file:
            file.write(b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes())
            file.write(bytes([DTYPE_CODES[self._dtype.name]]))
            file.write(np.array([len(lengths), len(lengths) + 1], "<u8").tobytes())
            lengths.tofile(file)
            offsets.tofile(file)
            np.arange(len(lengths) + 1, dtype="<i8").tofile(file)
            _durable(file)
        _durable(self._bin)
        self._bin.close()
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "bin_bytes": self._prefix.with_suffix(".bin").stat().st_size,
            "idx_bytes": index.stat().st_size,
        }


def read_document(prefix: Path, number: int, dtype: str, documents: int) -> np.ndarray:
    """The ids of one document, its EOD included."""
    index = np.memmap(prefix.with_suffix(".idx"), mode="r", dtype=np.uint8)
    start = 34
    lengths = index[start : start + 4 * documents].view("<i4")
    offsets = index[start + 4 * documents : start + 12 * documents].view("<i8")
    return np.fromfile(
        prefix.with_suffix(".bin"),
        dtype=np.dtype(dtype).newbyteorder("<"),
        count=int(lengths[number]),
        offset=int(offsets[number]),
    )


def _durable(file) -> None:  # type: ignore[no-untyped-def]
    file.flush()
    os.fsync(file.fileno())
