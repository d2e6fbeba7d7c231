"""Compressed files: what is in them, and where they can be cut."""

import bz2
import gzip
import lzma
import os

import pytest
import zstandard

from data_prep.errors import UserError
from data_prep.read import streams, zstd
from data_prep.read.lines import line_blocks
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


PACKED = {
    "zst": lambda data: zstandard.compress(data),
    "gz": lambda data: gzip.compress(data),
    "bz2": lambda data: bz2.compress(data),
    "xz": lambda data: lzma.compress(data),
}


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("byte", [b"a", b"\n"])
def test_text_that_expands_comes_in_small_chunks(ending: str, byte: bytes, tmp_path) -> None:
    """2 kB of zstd became one chunk of 64 MB."""
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(PACKED[ending](byte * (64 << 20)))
    (source,) = find_sources((path,))
    sizes = [len(chunk) for chunk, _ in read_chunks(source, 0, None, lambda _: None)]
    assert sum(sizes) == 64 << 20
    assert max(sizes) <= (1 << 20) + zstd.BLOCK_BYTES


def test_a_million_empty_lines_are_handed_on_in_blocks() -> None:
    """100 MB of them were one list, of 3 GB."""
    chunks = ((b"\n" * (1 << 20), True) for _ in range(8))
    counts = [len(lines) for _, lines in line_blocks(chunks, inside=False, longest=100)]
    assert sum(counts) == 8 << 20
    assert max(counts) <= 1 << 20


def zstd_blocks(blocks: list[tuple[int, int, bytes]], checksum: int = 0) -> bytes:
    """A frame of blocks: of each its kind (0: as it is, 1: one byte repeated), size and bytes."""
    frame = zstd.MAGIC + bytes([checksum << 2, 0x38])  # a window of 128 kB
    for number, (kind, size, data) in enumerate(blocks):
        last = number == len(blocks) - 1
        frame += (last | kind << 1 | size << 3).to_bytes(3, "little") + data
    return frame


def test_blocks_of_any_kind_give_the_same_text(tmp_path) -> None:
    repeated = [(1, 128 << 10, b"x")] * 40
    tiny = [(0, 1, b"%d" % (i % 10)) for i in range(3000)]
    skipped = (0x184D2A53).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"no!"
    level19 = zstandard.ZstdCompressor(level=19, write_checksum=True).compress(
        os.urandom(100) * 5000
    )
    parts = [
        (zstd_blocks(repeated), b"x" * (40 * (128 << 10))),
        (zstd_blocks(tiny), b"0123456789" * 300),
        (skipped, b""),
        (level19, zstandard.decompress(level19)),
        (zstd_blocks([(0, 0, b"")]), b""),
        (skipped * 3, b""),
    ]
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"".join(packed for packed, _ in parts))
    (source,) = find_sources((path,))
    counted: list[int] = []
    chunks = list(read_chunks(source, 0, None, counted.append))
    assert b"".join(chunk for chunk, _ in chunks) == b"".join(text for _, text in parts)
    assert max(len(chunk) for chunk, _ in chunks) <= (1 << 20) + zstd.BLOCK_BYTES
    assert all(owned for _, owned in chunks)
    # A range that ends inside the second frame owns two frames.
    end = len(parts[0][0]) + 5
    owned_text = b"".join(c for c, owned in read_chunks(source, 0, end, lambda _: None) if owned)
    assert owned_text == parts[0][1] + parts[1][1]
    for cut in (len(parts[0][0]) - 1, len(parts[0][0]) + 3, end, path.stat().st_size - 1):
        (tmp_path / "cut.txt.zst").write_bytes(path.read_bytes()[:cut])
        (short,) = find_sources((tmp_path / "cut.txt.zst",))
        with pytest.raises(UserError, match=r"is cut short|is damaged"):
            list(read_chunks(short, 0, None, lambda _: None))
