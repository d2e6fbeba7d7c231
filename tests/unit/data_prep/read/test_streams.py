"""Where compressed files can be cut."""

import os

import pytest
import zstandard

from data_prep.errors import UserError
from data_prep.read.streams import zstd_frames


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
