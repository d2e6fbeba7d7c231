"""One optimizer step, and one validation pass, by megatron-core's schedules."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from pretrain.config import TrainConfig
from pretrain.data import Batch, to_device


def _masked_mean(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of a micro-batch, for backward, and the same for the log."""
    loss = (losses.float() * loss_mask).sum() / loss_mask.sum()
    # A copy: the schedule divides the first in place by the number of micro-batches.
    return loss, {"loss": loss.detach().clone()}


def _masked_sum(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """For validation, where micro-batches may hold padding: the sum and its number of tokens."""
    total = (losses.double() * loss_mask).sum()
    return total, {"sum": torch.stack([total, loss_mask.double().sum()])}


def _forward(reduce: Callable, batches: Iterator[Batch], model: Any) -> tuple[Tensor, Callable]:
    """megatron-core's forward step. On the last stage: per-token losses [b, s] and the function
    that averages them; on the others what goes to the next stage, and the function is not called.
    """
    batch = to_device(next(batches))
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(reduce, batch["loss_mask"])


def _run_schedule(
    model: list[Any],
    micro_batches: list[Batch],
    config: TrainConfig,
    reduce: Callable,
    *,
    forward_only: bool,
) -> list[dict[str, Tensor]]:
    """All micro-batches through all stages. Returns what `reduce` logged: on the last stage one
    entry a micro-batch, on the others none.
    """
    return get_forward_backward_func()(
        forward_step_func=partial(_forward, reduce),
        data_iterator=[iter(micro_batches) for _ in model],
        model=model,
        num_microbatches=len(micro_batches),
        seq_length=config.data.seq_length,
        micro_batch_size=config.micro_batch_size,
        forward_only=forward_only,
    )


def _sum_over_ranks(x: Tensor) -> Tensor:
    """Over data-parallel ranks, and over stages, of which all but the last hold zeros."""
    torch.distributed.all_reduce(x, group=parallel_state.get_data_parallel_group())
    torch.distributed.all_reduce(x, group=parallel_state.get_pipeline_model_parallel_group())
    return x


def train_step(
    model: list[Any], optimizer: Any, scheduler: Any, batches: Iterator[Batch], config: TrainConfig
) -> tuple[float, float, float]:
    """Forward and backward of one global batch, then an update.

    Returns:
        (mean loss over the global batch, gradient norm before clipping, learning rate used).
    """
    data_parallel_size = parallel_state.get_data_parallel_world_size()
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    count = config.num_microbatches(data_parallel_size)
    micro_batches = list(itertools.islice(batches, count))
    outputs = _run_schedule(model, micro_batches, config, _masked_mean, forward_only=False)
    scheduler.step(increment=1)  # before the update: step 1 trains at the rate of step 1, not of 0
    learning_rate = optimizer.param_groups[0]["lr"]
    _, grad_norm, _ = optimizer.step()

    loss = torch.zeros((), device=torch.cuda.current_device())
    for output in outputs:
        loss += output["loss"] / (count * data_parallel_size)
    return _sum_over_ranks(loss).item(), float(grad_norm or 0.0), learning_rate


@torch.no_grad()
def validate(model: list[Any], batches: list[Batch], config: TrainConfig) -> float:
    """Mean cross-entropy, in nats a token, over all ranks' batches."""
    total = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    for chunk in model:
        chunk.eval()
    if batches:
        for output in _run_schedule(model, batches, config, _masked_sum, forward_only=True):
            total += output["sum"]
    for chunk in model:
        chunk.train()
    _sum_over_ranks(total)
    return (total[0] / total[1]).item()
