"""Sequences (sequences.py) as batches.

Which sequence a rank reads is a function of the step alone, so a resumed run, at any layout, goes on
with the next one.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pretrain.config.train import TrainConfig
from pretrain.processes import obey_parent_alone

Batch = dict[str, torch.Tensor]


def train_batches(
    dataset: Dataset,
    config: TrainConfig,
    *,
    data_parallel_rank: int,
    data_parallel_size: int,
    consumed_samples: int,
) -> Iterator[Batch]:
    """This rank's micro-batches from the given position to the end of the run."""

    def indices() -> Iterator[list[int]]:
        together = config.micro_batch_size * data_parallel_size
        first = data_parallel_rank * config.micro_batch_size
        end = config.train_steps * config.global_batch_size
        for start in range(consumed_samples, end, together):
            yield list(range(start + first, start + first + config.micro_batch_size))

    loader = DataLoader(
        dataset,
        batch_sampler=_Sampler(indices),
        num_workers=config.data.num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
        worker_init_fn=obey_parent_alone,
    )
    return iter(loader)


def validation_batches(
    dataset: Any,
    config: TrainConfig,
    *,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> list[Batch]:
    """This rank's share of the first `eval_sequences` of a split.

    Every micro-batch is full, and their number a multiple of the pipeline's stages, as its schedules
    need; what was added for that has a loss mask of zeros.
    """
    count = min(len(dataset), config.eval_sequences or len(dataset))
    samples = [dataset[i] for i in range(data_parallel_rank, count, data_parallel_size)]
    if not samples:
        return []
    multiple = config.micro_batch_size * config.parallel.pipeline_model_parallel_size
    padding = {**samples[0], "loss_mask": torch.zeros_like(samples[0]["loss_mask"])}
    samples += [padding] * (-len(samples) % multiple)
    return [
        torch.utils.data.default_collate(samples[start : start + config.micro_batch_size])
        for start in range(0, len(samples), config.micro_batch_size)
    ]


class _Sampler:
    """A batch sampler from a generator function."""

    def __init__(self, indices: Any) -> None:
        self._indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return self._indices()


_READ = ("tokens", "labels", "loss_mask", "position_ids", "documents", "teacher_logits", "scale")


def to_device(batch: Batch) -> Batch:
    """The tensors a forward pass reads, on this rank's device. All [micro_batch_size, seq_length, ...], but
    for the loss's `scale`, of training."""
    device = torch.cuda.current_device()
    return {name: batch[name].to(device, non_blocking=True) for name in _READ if name in batch}
