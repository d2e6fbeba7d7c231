"""Puts sequences (sequences.py) together into batches.

The step alone decides which sequences are trained on. So a resumed run continues with the next sequence,
at any layout.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from torch.utils.data import DataLoader, Dataset

from megatron_ladder.layers.attention.context import tokens_of
from pretrain.config.train import TrainConfig
from pretrain.processes import obey_parent_alone

Batch = dict[str, torch.Tensor]


class Batches(Protocol):
    """Micro-batches whose number is known before they are made."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


def train_batches(
    dataset: Dataset,
    config: TrainConfig,
    *,
    data_parallel_rank: int,
    data_parallel_size: int,
    consumed_samples: int,
) -> Iterator[Batch]:
    """This rank's micro-batches, from a position in the run to its end.

    Args:
        dataset: the run's sequences, in the order of training.
        consumed_samples: sequences that all ranks together have trained on already.

    Returns:
        Micro-batches on the CPU: the tensors of `Sequences`' items, [micro_batch_size, seq_length].
    """

    def indices() -> Iterator[list[int]]:
        together = config.micro_batch_size * data_parallel_size
        first = data_parallel_rank * config.micro_batch_size
        end = config.samples_after(config.train_steps)
        for start in range(consumed_samples, end, together):
            yield list(range(start + first, start + first + config.micro_batch_size))

    loader = DataLoader(
        dataset,
        batch_sampler=_Sampler(indices),
        num_workers=config.data.num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
        # Otherwise it would draw from the default generator when it starts, and only on ranks that read. So
        # ranks of a tensor-parallel group would drop different activations, and a resumed run other ones
        # than a run that was never stopped.
        generator=torch.Generator().manual_seed(config.seed),
        worker_init_fn=obey_parent_alone,
    )
    return iter(loader)


class ValidationBatches:
    """This rank's share of a split's first `eval_sequences` sequences, or of all when that is None.

    Every micro-batch is full, and the number of micro-batches is a multiple of the pipeline's stages,
    because the pipeline's schedules need both. Sequences that are added for this have a loss mask of zeros.

    Micro-batches are on the CPU, as in `train_batches`; there are none when no sequence is left for this
    rank. Each is made when it is taken: those of a whole split may not fit in the host's memory.
    """

    def __init__(
        self,
        dataset: Any,
        config: TrainConfig,
        *,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        self._dataset, self._config = dataset, config
        self._mine = held_out_sequences(
            len(dataset),
            config,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
        )

    def __len__(self) -> int:
        return held_out_micro_batches(len(self._mine), self._config)

    def __iter__(self) -> Iterator[Batch]:
        width = self._config.micro_batch_size
        for start in range(0, len(self) * width, width):
            samples = [self._dataset[i] for i in self._mine[start : start + width]]
            if missing := width - len(samples):
                first = self._dataset[self._mine[0]]
                samples += [{**first, "loss_mask": torch.zeros_like(first["loss_mask"])}] * missing
            yield torch.utils.data.default_collate(samples)


def held_out_sequences(
    count: int, config: TrainConfig, *, data_parallel_rank: int, data_parallel_size: int
) -> range:
    """The numbers of this rank's sequences of a validation split that has `count`."""
    return range(data_parallel_rank, min(count, config.eval_sequences or count), data_parallel_size)


def held_out_micro_batches(sequences: int, config: TrainConfig) -> int:
    """The number of micro-batches that hold so many sequences: a multiple of the pipeline's stages."""
    stages = config.parallel.pipeline_model_parallel_size
    return stages * -(-sequences // (stages * config.micro_batch_size))


class _Sampler:
    """A DataLoader's batch sampler, made from a generator function."""

    def __init__(self, indices: Any) -> None:
        self._indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return self._indices()


_OF_TOKENS = ("tokens", "labels", "loss_mask", "position_ids")
_AS_THEY_ARE = ("teacher_logits", "scale")


def to_device(batch: Batch) -> Batch:
    """What a forward pass reads of a micro-batch, on this rank's device.

    What is per token is [micro_batch_size, seq_length]. With context parallelism this rank's tokens are cut
    of it here, and nowhere else. The teacher's logits were made of these: [micro_batch_size, seq_length /
    context ranks, ...]. `scale` is a scalar, the factor of the loss in training. Documents' numbers stay
    on the host, those of whole sequences.
    """
    device = torch.cuda.current_device()
    rank = parallel_state.get_context_parallel_rank()
    size = parallel_state.get_context_parallel_world_size()
    whole = {n: batch[n].to(device, non_blocking=True) for n in _OF_TOKENS if n in batch}
    rest = {n: batch[n].to(device, non_blocking=True) for n in _AS_THEY_ARE if n in batch}
    return {name: tokens_of(x, rank, size) for name, x in whole.items()} | rest
