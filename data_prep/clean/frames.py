"""Files of JSON lines in zstd frames, which `data tokenize` can cut between frames."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import zstandard

from data_prep.files import sync_file, sync_folder, temporary_name

FRAME_BYTES = 32 << 20


class Frames:
    """Writes JSON lines in zstd frames: durable when closed, in its place by one rename."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = temporary_name(path)
        self._file = self._temporary.open("wb")
        self._begin()

    def _begin(self) -> None:
        self._frame = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()
        self._held = 0

    def write(self, record: dict[str, Any]) -> None:
        line = orjson.dumps(record) + b"\n"
        self._file.write(self._frame.compress(line))
        self._held += len(line)
        if self._held >= FRAME_BYTES:
            self._file.write(self._frame.flush())
            self._begin()

    def __enter__(self) -> "Frames":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            if self._held:
                self._file.write(self._frame.flush())
            self._file.close()
            sync_file(self._temporary)
            self._temporary.replace(self._path)
            sync_folder(self._path.parent)
        else:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


def read_frames(path: Path) -> Iterator[dict[str, Any]]:
    """What `Frames` wrote."""
    with path.open("rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        for line in io.BufferedReader(reader, 1 << 20):
            yield orjson.loads(line)
