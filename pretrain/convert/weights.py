"""Reads and writes a checkpoint's weights one tensor or one layer at a time, for models larger than memory.

The format is torch's distributed checkpoint, as megatron-core writes it; a run can load it at any layout.
"""

import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    SavePlan,
    save,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.utils import _create_file_view
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_ladder.hf.ahead import one_ahead
from megatron_ladder.hf.convert import Chunk
from megatron_ladder.hf.output import synced_behind
from pretrain.run.checkpoint_files import refuse_damaged


@dataclass(frozen=True)
class CheckpointTensor:
    """A whole tensor in a checkpoint; it may be stored in several pieces. Indexing reads it from disk."""

    shape: torch.Size
    dtype: torch.dtype
    pieces: tuple[tuple[ChunkStorageMetadata, Path, int, int], ...]
    """For each piece: its place and size in the tensor; its file, and its offset and length in the file."""

    def __getitem__(self, which: int | slice) -> Tensor:
        """Reads one layer (an index on axis 0), or with `[:]` the whole tensor."""
        assert isinstance(which, int) or which == slice(None)
        if isinstance(which, int):
            pieces = [p for p in self.pieces if _holds(p[0], which)]
            result = torch.empty(self.shape[1:], dtype=self.dtype)
        else:
            pieces, result = list(self.pieces), torch.empty(self.shape, dtype=self.dtype)
        for chunk, path, offset, length in pieces:
            with path.open("rb") as file:
                part = cast(IO[bytes], _create_file_view(file, offset, length))
                piece = torch.load(part, weights_only=True)
            begin, size = list(chunk.offsets), list(chunk.sizes)
            if isinstance(which, int):
                piece, begin, size = piece[which - begin[0]], begin[1:], size[1:]
            if tuple(size) == tuple(result.shape):
                return piece
            place = tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))
            result[place] = piece
        return result


def _holds(chunk: ChunkStorageMetadata, layer: int) -> bool:
    return chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]


def checkpoint_weights(checkpoint: Path) -> dict[str, CheckpointTensor]:
    """A checkpoint's weights by megatron-core's names. Layers are stacked on axis 0.

    Nothing is read into memory until a weight is indexed. It needs no model, no process group and no GPU,
    and takes checkpoints of any layout.

    Raises:
        UserError: a file is damaged or missing. All files are read once to check that.
    """
    refuse_damaged(checkpoint, read=True)
    metadata = FileSystemReader(checkpoint).read_metadata()
    weights = {}
    for name, facts in metadata.state_dict_metadata.items():
        if not isinstance(facts, TensorStorageMetadata) or name.startswith("optimizer."):
            continue
        pieces = []
        for chunk in facts.chunks:
            stored = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            path = checkpoint / stored.relative_path
            pieces.append((chunk, path, stored.offset, stored.length))
        weights[name] = CheckpointTensor(facts.size, facts.properties.dtype, tuple(pieces))
    return weights


def write_weights(folder: Path, chunks: Sequence[Chunk]) -> None:
    """Writes a checkpoint's tensors into a folder. Each tensor is made just before it is written.

    When it returns, the tensors are on disk (fsync); the caller must sync the index and the folder.

    Raises:
        What `Chunk.make` raises, and OSError.
    """
    # One thread, since torch loses the errors of other threads. One file for each tensor, since torch
    # keeps all tensors of a file in memory until the file is written.
    writer = FileSystemWriter(folder, single_file_per_rank=False, thread_count=1, sync_files=False)
    crc = get_crc32_options()
    set_crc32_options(False)  # torch.load does not read them
    try:
        with warnings.catch_warnings():
            # torch warns that there are no ranks, and that the folder is not empty. Both are intended:
            # megatron-core has begun the folder.
            warnings.simplefilter("ignore", UserWarning)
            with synced_behind() as sync:
                writer.fs = _SyncedBehind(sync)
                save({}, storage_writer=writer, planner=_OneAtATime(chunks), no_dist=True)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error
    finally:
        set_crc32_options(crc)


class _SyncedBehind(FileSystem):
    """Syncs each file to disk when it is complete, while the next one is written."""

    def __init__(self, sync: Callable[[Path], None]) -> None:
        super().__init__()
        self._sync = sync

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            yield stream
        if "w" in mode and Path(path).suffix == ".distcp":  # not the index: torch renames it later
            self._sync(Path(path))


class _OneAtATime(DefaultSavePlanner):
    """A plan to save tensors that do not exist yet. Each is made while the one before it is written."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        super().__init__(flatten_state_dict=False)
        self._chunks = {_index(chunk): chunk for chunk in chunks}
        self._made = one_ahead((_index(chunk), _made(chunk)) for chunk in chunks)

    def create_local_plan(self) -> SavePlan:
        items = []
        for index, chunk in self._chunks.items():
            shape = torch.Size(chunk.shape)
            assert index.offset is not None
            sizes = shape if chunk.layer is None else torch.Size([1, *shape[1:]])
            data = TensorWriteData(
                ChunkStorageMetadata(index.offset, sizes), TensorProperties(chunk.dtype), shape
            )
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        index, tensor = next(self._made)
        assert index == write_item.index, "torch writes in the plan's order"
        return tensor


def _made(chunk: Chunk) -> Tensor:
    tensor = chunk.make()
    return tensor if chunk.layer is None else tensor.unsqueeze(0)


def _index(chunk: Chunk) -> MetadataIndex:
    offset = [0] * len(chunk.shape)
    offset[0] = chunk.layer or 0
    return MetadataIndex(chunk.name, torch.Size(offset))
