"""Reads and writes a checkpoint's weights one tensor or one layer at a time, for models larger than memory.

The format is torch's distributed checkpoint, as megatron-core writes it; a run can load it at any layout.
"""

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultSavePlanner,
    FileSystemWriter,
    SavePlan,
    save,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_ladder.errors import UserError
from megatron_ladder.hf.convert import Chunk
from megatron_ladder.hf.files.ahead import one_ahead
from megatron_ladder.reading.index import Chunk as StoredChunk
from megatron_ladder.reading.index import check_files, read_index
from megatron_ladder.reading.plain_files import NotData, open_plain
from megatron_ladder.reading.tensors import read_tensor
from pretrain.config.train import load_config
from pretrain.files import sync
from pretrain.run.checkpoint_files import NO_WEIGHTS, Facts, refuse_damaged, sums
from pretrain.run.folder import backbone_of, find_checkpoint


@dataclass(frozen=True)
class CheckpointTensor:
    """A whole tensor in a checkpoint; it may be stored in several pieces. Indexing reads it from disk."""

    shape: torch.Size
    dtype: torch.dtype
    """Of what indexing returns."""
    folder: Path
    """Of the checkpoint."""
    pieces: tuple[StoredChunk, ...]
    stored_dtype: torch.dtype

    def __getitem__(self, which: int | slice | tuple[int, ...]) -> Tensor:
        """Reads one layer (an index on axis 0), one expert of a layer, or with `[:]` the whole tensor."""
        return self.as_stored(which).to(self.dtype)

    def as_stored(self, which: int | slice | tuple[int, ...]) -> Tensor:
        """The same in the dtype that it is stored in."""
        assert not isinstance(which, slice) or which == slice(None)
        place = () if isinstance(which, slice) else which if isinstance(which, tuple) else (which,)
        axes = len(place)
        result = torch.empty(self.shape[axes:], dtype=self.stored_dtype)
        for chunk in (piece for piece in self.pieces if _holds(piece, place)):
            begin, size = chunk.offsets[axes:], chunk.sizes[axes:]
            piece = self._read(chunk)[
                tuple(i - b for i, b in zip(place, chunk.offsets, strict=False))
            ]
            if tuple(size) == tuple(result.shape):
                return piece
            result[tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))] = piece
        return result

    def _read(self, chunk: StoredChunk) -> Tensor:
        if (place := chunk.place) is None:  # it has no elements
            return torch.empty(chunk.sizes, dtype=self.stored_dtype)
        try:
            file, _ = open_plain(self.folder, place.file)
            with file:
                piece = read_tensor(file, place.begin, place.length)
            if piece.dtype != self.stored_dtype or piece.shape != chunk.sizes:
                raise NotData("has another shape or dtype than its index says")
        except NotData as error:
            raise UserError(
                f"{self.folder} cannot be read: a tensor in {place.file} {error}"
            ) from error
        return piece


_STATES = {"trained": "", "master": "optimizer.state.param.", "ema": "optimizer.state.ema."}
"""What a name in the checkpoint begins with."""


def _holds(chunk: StoredChunk, place: tuple[int, ...]) -> bool:
    """Whether a part of a tensor is in a piece of it, as far as its first axes tell."""
    first = zip(place, chunk.offsets, chunk.sizes, strict=False)
    return all(begin <= i < begin + size for i, begin, size in first)


Which = Literal["trained", "master", "ema"]


def checkpoint_weights(checkpoint: Path, which: Which = "trained") -> dict[str, CheckpointTensor]:
    """A checkpoint's weights by megatron-core's names. Layers are stacked on axis 0.

    Nothing is read into memory until a weight is indexed. It needs no model, no process group and no GPU,
    and takes checkpoints of any layout.

    Args:
        which: trained: the weights as training computes with them. master: the optimizer's fp32 copies of
            them, where it has some. ema: their average over the steps. All have the weights' dtype, however
            they are stored.

    Raises:
        UserError: a file is damaged or missing, or there is no average. All files are read once to check
            that.
    """
    refuse_damaged(checkpoint, read=True)
    try:
        index = read_index(checkpoint)
        check_files(index, checkpoint)
    except (NotData, FileNotFoundError) as error:
        raise UserError(f"{checkpoint} cannot be read: {error}") from error
    found = {}
    for name, weight in index.tensors.items():
        if name.startswith(NO_WEIGHTS):
            continue
        tensor = index.tensors.get(f"{_STATES[which]}{name}", weight)
        if which == "ema" and tensor is weight:
            raise UserError(
                f"{checkpoint} has no average of the weights: a run keeps one with --optimizer.ema-decay"
            )
        shape, dtype = torch.Size(tensor.shape), getattr(torch, weight.dtype)
        stored = getattr(torch, tensor.dtype)
        found[name] = CheckpointTensor(shape, dtype, checkpoint, tensor.chunks, stored)
    return found


def run_weights(checkpoint: Path, which: Which = "trained") -> dict[str, CheckpointTensor]:
    """As `checkpoint_weights`, and of a side-tuned run the weights of its backbone too.

    Raises:
        UserError: from `checkpoint_weights`, or the backbone is not in the run's folder.
    """
    weights = checkpoint_weights(checkpoint, which)
    if load_config(checkpoint / "config.json").side.is_on:
        backbone = find_checkpoint(backbone_of(checkpoint.parents[1]))
        weights = {**checkpoint_weights(backbone), **weights}
    return weights


def write_weights(folder: Path, chunks: Sequence[Chunk]) -> Facts:
    """Writes a checkpoint's tensors into a folder. Each tensor is made just before it is written.

    When it returns, the tensors are on disk (fsync); the caller must sync the index and the folder.

    Returns:
        The files' sizes and checksums, for `write_manifest`.

    Raises:
        What `Chunk.make` raises, and OSError.
    """
    # One thread, since torch loses the errors of other threads. One file for each tensor, since torch
    # keeps all tensors of a file in memory until the file is written.
    writer = FileSystemWriter(folder, single_file_per_rank=False, thread_count=1, sync_files=False)
    crc = get_crc32_options()
    set_crc32_options(False)  # nothing reads them
    try:
        with warnings.catch_warnings():
            # torch warns that there are no ranks, and that the folder is not empty. Both are intended:
            # megatron-core has begun the folder.
            warnings.simplefilter("ignore", UserWarning)
            with ThreadPoolExecutor(1) as thread:
                writer.fs = files = _SummedBehind(thread)
                save({}, storage_writer=writer, planner=_OneAtATime(chunks), no_dist=True)
        return files.facts()
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error
    finally:
        set_crc32_options(crc)


class _SummedBehind(FileSystem):
    """Syncs each complete file and computes its checksum, in a thread while the next one is written."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        super().__init__()
        self._thread = thread
        self._files: list[Future[Facts]] = []

    def facts(self) -> Facts:
        """Raises OSError when a file could not be synced or read."""
        return {name: facts for file in self._files for name, facts in file.result().items()}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            yield stream
        if "w" in mode and Path(path).suffix == ".distcp":  # not the index: torch renames it later
            self._files.append(self._thread.submit(_synced_sums, Path(path)))


def _synced_sums(path: Path) -> Facts:
    sync(path)
    return sums([path])


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
            axes = len(chunk.place)
            sizes = torch.Size([*[1] * axes, *shape[axes:]])
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
    return tensor[(None,) * len(chunk.place)]


def _index(chunk: Chunk) -> MetadataIndex:
    rest = len(chunk.shape) - len(chunk.place)
    return MetadataIndex(chunk.name, torch.Size([*chunk.place, *[0] * rest]))
