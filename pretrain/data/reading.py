"""Which ranks read the data sets, and how the other ranks get their batches.

The tensor- and context-parallel ranks of a pipeline stage need the same sequences: the first of them reads
and broadcasts. A stage between the first and the last one needs no tokens, unless documents are apart: each
stage needs to know where they begin. Ranks that do not read open no file of any data set.
"""

import itertools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ladder.fields.windows import attention_length
from megatron_ladder.layers.attention.documents import Documents
from pretrain.config.train import TrainConfig
from pretrain.data.batches import (
    Batch,
    Batches,
    ValidationBatches,
    held_out_micro_batches,
    held_out_sequences,
    train_batches,
)
from pretrain.data.folders import DataFolder, labels
from pretrain.data.sequences import one_split, train_sequences


class RankBatches:
    """This rank's batches of training and validation, read or received. megatron-core's groups must exist.

    Every rank calls every method, and takes as many batches as the others.
    """

    def __init__(self, config: TrainConfig, folders: list[DataFolder], cache: Path) -> None:
        """
        Args:
            cache: the folder of index files, all of which are made.
        """
        self._config = config
        self._folders = folders
        self._cache = cache
        self._data_parallel: dict[str, int] = {
            "data_parallel_rank": parallel_state.get_data_parallel_rank(),
            "data_parallel_size": parallel_state.get_data_parallel_world_size(),
        }
        self._needs = (
            parallel_state.is_pipeline_first_stage(ignore_virtual=True)
            or parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            or not config.data.attend_across_documents
        )
        # All ranks that need the same sequences; with context parallelism each takes its tokens of them
        # (batches.to_device).
        self._group = parallel_state.get_tensor_and_context_parallel_group()
        self.reads = self._needs and self._group.rank() == 0
        """Whether this rank opens the data sets."""
        self._documents: list[torch.Tensor] = []

    def training(self, consumed_samples: int) -> Iterator[Batch]:
        """What this rank reads, from a position in the run to its end: one item a micro-batch.

        Returns:
            As `train_batches`; empty items on a rank that does not read. `received` makes batches of them.
        """
        config = self._config
        if self.reads:
            sequences = train_sequences(config, self._folders, self._cache, made=True)
            batches = train_batches(
                sequences, config, consumed_samples=consumed_samples, **self._data_parallel
            )
            return map(self._counted, batches)
        together = config.micro_batch_size * self._data_parallel["data_parallel_size"]
        end = config.samples_after(config.train_steps)
        return itertools.repeat({}, len(range(consumed_samples, end, together)))

    def _counted(self, batch: Batch) -> Batch:
        if "documents" in batch:
            self._documents.append(batch["documents"])
        return batch

    def attended(self) -> float:
        """`attention_length` of what this rank has read for training since the last call: of sequences, or
        of documents where they are apart."""
        lengths = [n for part in self._documents for row in Documents(part).lengths for n in row]
        self._documents.clear()
        return attention_length(self._config.model, lengths or [self._config.data.seq_length])

    def received(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches of `training` or `validation`, on every rank that needs them; {} on others."""
        return map(self._received, batches)

    def validation(self, done: Collection[str] = ()) -> Iterator[tuple[str, Batches]]:
        """Each data set's label and what this rank reads of its validation split, as in
        `ValidationBatches`; empty items on a rank that does not read. `received` makes batches of them.

        A data set is open only while it is read. Those whose validation split has no whole sequence are
        left out.

        Args:
            done: labels that are left out.
        """
        length = self._config.data.seq_length
        for label, folder in zip(labels(self._folders), self._folders, strict=True):
            if label not in done and folder.validates(length):
                # As many as megatron-core cuts of a split: each takes one token more, its last label.
                count = (folder.tokens("validation") - 1) // length
                yield label, self._held_out(folder, count)

    def _held_out(self, folder: DataFolder, count: int) -> Batches:
        mine = held_out_sequences(count, self._config, **self._data_parallel)
        if not mine:
            return []
        if not self.reads:
            return [{}] * held_out_micro_batches(len(mine), self._config)
        split = one_split(self._config, folder, "validation", None, self._cache, made=True)
        return ValidationBatches(split, self._config, **self._data_parallel)

    def _received(self, batch: Batch) -> Batch:
        """Passes a batch on within the group, on the device. The host waits for nothing but the documents'
        numbers, on ranks that do not read: their lengths are arguments of kernels."""
        group = self._group
        if not self._needs or group.size() == 1:
            return batch
        device: Any = torch.cuda.current_device()
        names = ["tokens", "labels", "loss_mask"]
        if not self._config.data.attend_across_documents:
            names.append("documents")
        length = self._config.data.seq_length
        shape = (len(names), self._config.micro_batch_size, length)
        packed = torch.empty(shape, dtype=torch.int32, device=device)
        if self.reads:
            for row, name in zip(packed, names, strict=True):
                # To the device first: a copy that converts waits for the GPU.
                row.copy_(batch[name].to(device, non_blocking=True))
        dist.broadcast(packed, dist.get_global_rank(group, 0), group)
        received = dict(zip(names, packed, strict=True))
        if "documents" in received:
            received["documents"] = batch["documents"] if self.reads else packed[3].cpu()
        received["tokens"], received["labels"] = packed[0].long(), packed[1].long()
        received["loss_mask"] = packed[2].float()
        positions = torch.arange(length, device=device)
        received["position_ids"] = positions.repeat(self._config.micro_batch_size, 1)
        return received
