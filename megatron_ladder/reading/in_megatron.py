"""Lets megatron-core read checkpoints with the readers of this room. Its own, and torch's, run pickles.

megatron-core 0.16.1 and 0.19.2 make their reader in one function, and read common.pt in another one; only
these are replaced. Everything else of loading is theirs.
"""

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import common
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, Metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from megatron_ladder.errors import UserError
from megatron_ladder.reading.contents import COMMON, check_format, object_at, read_common
from megatron_ladder.reading.index import Index, Place, read_index
from megatron_ladder.reading.plain_files import NotData, open_plain
from megatron_ladder.reading.tensors import read_tensor, with_tensors

P = ParamSpec("P")
R = TypeVar("R")


def read_as_data() -> None:
    """From now on, whatever megatron-core loads in this process is read as data alone."""
    for module in (torch_dist, serialization):
        module._get_filesystem_reader = _reader
    # 0.16: a method; 0.19: a function, which another module has imported.
    if hasattr(common, "TorchCommonLoadStrategy"):
        common.TorchCommonLoadStrategy.load_common = lambda _, folder: _load_common(folder)
    else:
        common.load_common = serialization.load_common = _load_common


def says_what_is_wrong(load: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function that loads a checkpoint: it raises UserError when the checkpoint is no data, or
    is not of this model. The first argument is the checkpoint's folder."""

    @functools.wraps(load)
    def loads(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            check_format(Path(cast(Any, args[0])))
            return load(*args, **kwargs)
        except CheckpointException as failed:  # torch's, of all ranks
            for cause, _ in failed.failures.values():
                if said := _about_the_files(cause):
                    raise UserError(f"{args[0]} cannot be loaded: {said}") from failed
            raise
        except (NotData, CheckpointingException, FileNotFoundError, KeyError) as error:
            if said := _about_the_files(error):
                raise UserError(f"{args[0]} cannot be loaded: {said}") from error
            raise

    return loads


def _about_the_files(error: BaseException) -> str:
    """What is wrong with a checkpoint's files, in words; "" where the error is another one."""
    if isinstance(error, NotData | CheckpointingException):
        return str(error).partition("\n")[0][:300]
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{Path(error.filename).name} is missing"
    name, found, _ = str(error).strip("'\"").partition(" from model not in state dict")
    return f"it has no tensor {name[:200]}" if isinstance(error, KeyError) and found else ""


def _reader(checkpoint_dir: Any, *_: Any, **__: Any) -> "DataReader":
    return DataReader(checkpoint_dir)


def _load_common(folder: Any) -> Any:
    value = read_common(Path(folder))
    file, _ = open_plain(Path(folder), COMMON)
    with file:
        return with_tensors(value, file)


class DataReader(FileSystemReader):
    """torch's reader of distributed checkpoints, which reads as data what torch unpickles."""

    def __init__(self, path: Any) -> None:
        """Reads the index at once, for torch would hide why it cannot. Raises NotData, OSError."""
        super().__init__(path)
        self._folder = Path(path)
        self._metadata = _metadata(read_index(self._folder))

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads what a rank needs into its tensors. Objects go to the planner, as bytes of torch.save."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            file, _ = open_plain(self._folder, name)
            with file:
                for item in items:
                    self._read(file, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, file: Any, item: ReadItem, planner: LoadPlanner) -> None:
        stored: _StorageInfo = self.storage_data[item.storage_index]
        place = Place(stored.relative_path, stored.offset, stored.length)
        name = item.storage_index.fqn
        if item.type == LoadItemType.BYTE_IO:
            # The planner unpickles these bytes. They are not the file's, but made of plain values.
            made = io.BytesIO()
            torch.save(with_tensors(object_at(file, name, place), file), made)
            made.seek(0)
            planner.load_bytes(item, made)
            return
        try:
            tensor = read_tensor(file, place.begin, place.length)
            part = narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)
        except (NotData, RuntimeError, IndexError) as error:
            raise NotData(
                f"{place.file}: {name} is not the tensor of the index ({error})"
            ) from error
        target = planner.resolve_tensor(item).detach()
        if target.shape != part.shape:
            raise NotData(f"{place.file}: {name} has another shape than in the index")
        target.copy_(part)
        planner.commit_tensor(item, target)


def _metadata(index: Index) -> Metadata:
    entries: dict[str, Any] = {name: BytesStorageMetadata() for name in index.objects}
    places = {MetadataIndex(name): _info(place) for name, place in index.objects.items()}
    for name, tensor in index.tensors.items():
        dtype = cast(torch.dtype, getattr(torch, tensor.dtype))
        chunks = []
        for chunk in tensor.chunks:
            offsets = torch.Size(chunk.offsets)
            chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
            if chunk.place:
                places[MetadataIndex(name, offsets)] = _info(chunk.place)
        properties = TensorProperties(dtype)
        entries[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
    return Metadata(entries, storage_data=places)


def _info(place: Place) -> _StorageInfo:
    return _StorageInfo(place.file, place.begin, place.length)
