"""Whether an .idx describes its .bin. megatron-core believes it, and reads where it says.

docs/reference/formats.md has the layout.
"""

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_ladder.errors import UserError

HEADER_BYTES = 34
CODES = {"int32": 4, "uint16": 8}
DOCUMENTS_AT_ONCE = 1 << 20


def check_index(prefix: Path, facts: dict[str, Any], dtype: str) -> None:
    """Reads the whole .idx, a little at a time: 20 bytes a document.

    Args:
        prefix: the split's path, without `.idx`.
        facts: of the split, from the manifest; its sizes are those of the files.
        dtype: of the tokens.

    Raises:
        UserError: its header, a length, an offset or a document is not what `facts` and the lengths make
            it, or its checksum is another.
    """
    path, documents = prefix.with_suffix(".idx"), facts["documents"]
    width = np.dtype(dtype).itemsize
    again = "the data set is damaged, copy or tokenize it again"
    if facts["idx_bytes"] != HEADER_BYTES + 12 * documents + 8 * (documents + 1):
        raise UserError(
            f"{path} has {facts['idx_bytes']:,} bytes, which are not the index of the manifest's "
            f"{documents:,} documents: {again}"
        )
    digest = hashlib.sha256()

    def read(file: BinaryIO, kind: str, count: int) -> np.ndarray:
        data = file.read(count * np.dtype(kind).itemsize)
        digest.update(data)
        if len(data) != count * np.dtype(kind).itemsize:
            raise UserError(f"{path} is cut short: {again}")
        return np.frombuffer(data, kind)

    def refuse(what: str, wrong: np.ndarray, first: int) -> None:
        if wrong.any():
            number = first + int(wrong.argmax())
            raise UserError(f"{path}: the {what} of document {number:,} is wrong: {again}")

    starts = range(0, documents, DOCUMENTS_AT_ONCE)
    with path.open("rb") as file, path.open("rb") as lengths_again:
        header = file.read(HEADER_BYTES)
        digest.update(header)
        if header[:17] != b"MMIDIDX\x00\x00\x01" + bytes(7) or header[17] != CODES[dtype]:
            raise UserError(f"{path} is not the index of {dtype} tokens: tokenize again")
        if header[18:] != np.array([documents, documents + 1], "<u8").tobytes():
            raise UserError(f"{path} is not the index of {documents:,} documents: {again}")
        tokens = 0
        for first in starts:
            lengths = read(file, "<i4", min(DOCUMENTS_AT_ONCE, documents - first))
            refuse("length", lengths < 1, first)
            tokens += int(lengths.sum(dtype=np.int64))
        if tokens != facts["tokens"] or tokens * width != facts["bin_bytes"]:
            raise UserError(
                f"{path} describes {tokens:,} tokens but {prefix}.bin holds "
                f"{facts['bin_bytes'] // width:,}, and the manifest says {facts['tokens']:,}: the files "
                "are of different data sets, tokenize again"
            )
        lengths_again.seek(HEADER_BYTES)
        end = 0
        for first in starts:
            count = min(DOCUMENTS_AT_ONCE, documents - first)
            lengths = np.frombuffer(lengths_again.read(4 * count), "<i4")
            ends = end + np.cumsum(lengths, dtype=np.int64)
            refuse("offset", read(file, "<i8", count) != (ends - lengths) * width, first)
            end = int(ends[-1])
        for first in range(0, documents + 1, DOCUMENTS_AT_ONCE):
            count = min(DOCUMENTS_AT_ONCE, documents + 1 - first)
            refuse("place", read(file, "<i8", count) != np.arange(first, first + count), first)
    if facts.get("idx_sha256", digest.hexdigest()) != digest.hexdigest():
        raise UserError(f"{path}: its SHA-256 is not the manifest's: {again}")
