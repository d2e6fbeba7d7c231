"""One optimizer step, and one validation pass, by megatron-core's schedules."""

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


def _forward(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Callable]:
    """megatron-core's forward step: per-token losses [b, s] and the function that averages them."""
    batch = to_device(next(batches))
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(_masked_mean, batch["loss_mask"])


def train_step(
    model: Any, optimizer: Any, scheduler: Any, batches: Iterator[Batch], config: TrainConfig
) -> tuple[float, float, float]:
    """Forward and backward of one global batch, then an update.

    Returns:
        (mean loss over the global batch, gradient norm before clipping, learning rate used).
    """
    data_parallel_size = parallel_state.get_data_parallel_world_size()
    model.zero_grad_buffer()
    optimizer.zero_grad()
    outputs = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=batches,
        model=[model],
        num_microbatches=config.num_microbatches(data_parallel_size),
        seq_length=config.data.seq_length,
        micro_batch_size=config.micro_batch_size,
    )
    scheduler.step(increment=1)  # before the update: step 1 trains at the rate of step 1, not of 0
    learning_rate = optimizer.param_groups[0]["lr"]
    _, grad_norm, _ = optimizer.step()

    loss = torch.stack([output["loss"] for output in outputs]).mean()
    torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group())
    return loss.item() / data_parallel_size, float(grad_norm or 0.0), learning_rate


@torch.no_grad()
def validate(model: Any, batches: Iterator[Batch]) -> float:
    """Mean cross-entropy, in nats a token, over all ranks' batches."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    for batch in batches:
        losses, _ = _forward(iter([batch]), model)
        mask = batch["loss_mask"].to(losses.device)
        total += torch.stack([(losses.double() * mask).sum(), mask.double().sum()])
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    model.train()
    return (total[0] / total[1]).item()
