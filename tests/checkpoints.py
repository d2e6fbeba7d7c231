"""A small checkpoint, written by torch as megatron-core does, without a model or a process group."""

import io
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan, save
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

WEIGHT = torch.arange(24, dtype=torch.float32).reshape(4, 6)
BIAS = torch.arange(3, dtype=torch.bfloat16)
STATES = [{"cpu": torch.arange(5, dtype=torch.uint8), "tracker": {"one": torch.ones(2)}}]


def write_checkpoint(folder: Path) -> Path:
    """A tensor in four parts, one in a single part, and random states."""
    folder.mkdir(parents=True)
    save({}, storage_writer=FileSystemWriter(folder), planner=_Planner(), no_dist=True)
    (folder / "metadata.json").write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    )
    return folder


class _Planner(DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def create_local_plan(self) -> SavePlan:
        sizes = torch.Size([2, 3])
        items = [
            _item("weight", WEIGHT, torch.Size([row, column]), sizes)
            for row in (0, 2)
            for column in (0, 3)
        ]
        items.append(_item("bias", BIAS, torch.Size([0]), BIAS.shape))
        items.append(WriteItem(MetadataIndex("rng/shard_0_1"), WriteItemType.BYTE_IO))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            file = io.BytesIO()
            torch.save(STATES, file)
            return file
        tensor = {"weight": WEIGHT, "bias": BIAS}[write_item.index.fqn]
        assert write_item.tensor_data is not None
        assert write_item.tensor_data.chunk is not None
        chunk = write_item.tensor_data.chunk
        ranges = [slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True)]
        return tensor[tuple(ranges)].clone()


def _item(name: str, tensor: torch.Tensor, offsets: torch.Size, sizes: torch.Size) -> WriteItem:
    data = TensorWriteData(
        ChunkStorageMetadata(offsets, sizes), TensorProperties(tensor.dtype), tensor.shape
    )
    return WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)
