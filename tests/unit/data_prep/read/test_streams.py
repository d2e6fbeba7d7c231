"""Compressed files: what is in them, and where they can be cut."""

import bz2
import gzip
import lzma
import os

import pytest
import zstandard

from data_prep.errors import UserError
from data_prep.read import streams
from data_prep.read.sources import find_sources
from data_prep.read.streams import read_chunks
from data_prep.read.zstd import zstd_frames


def test_zstd_frames_of_damaged_files(tmp_path) -> None:
    path = tmp_path / "a.zst"
    frames = [zstandard.compress(os.urandom(300_000)) for _ in range(3)]
    path.write_bytes(b"".join(frames))
    sizes = [len(f) for f in frames]
    assert zstd_frames(str(path)) == [0, sizes[0], sizes[0] + sizes[1]]
    path.write_bytes(b"".join(frames)[:-5])
    with pytest.raises(UserError, match="is cut short"):
        zstd_frames(str(path))
    path.write_bytes(frames[0] + b"junk" + frames[1])
    with pytest.raises(UserError, match=f"no zstd frame begins at byte {sizes[0]}"):
        zstd_frames(str(path))


@pytest.mark.parametrize(
    ("ending", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)]
)
@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1 << 20])
def test_members_and_zeros_wherever_chunks_end(
    ending, pack, chunk_bytes, tmp_path, monkeypatch
) -> None:
    """Zeros fill up a tape's or a device's last block; xz allows them by fours."""
    path = tmp_path / f"a.txt.{ending}"
    texts = [os.urandom(40).hex().encode() * 3, b"", b"second"]
    zeros = b"\0" * 12
    members = [pack(text) + zeros for text in texts]
    monkeypatch.setattr(streams, "CHUNK_BYTES", chunk_bytes)

    def read(content: bytes) -> bytes:
        path.write_bytes(content)
        (source,) = find_sources((path,))
        counted: list[int] = []
        found = b"".join(chunk for chunk, _ in read_chunks(source, 0, None, counted.append))
        assert sum(counted) == len(content)
        return found

    if chunk_bytes < 16:  # too few bytes to tell what the file is
        monkeypatch.setattr(streams, "MAGIC", {})
    whole = b"".join(members)
    assert read(whole) == b"".join(texts)
    assert read(whole + pack(b"third")) == b"".join(texts) + b"third"
    with pytest.raises(UserError, match="is cut short"):
        read(whole.rstrip(b"\0")[:-1])
    with pytest.raises(UserError, match="is damaged"):
        read(whole + b"no member begins so")
