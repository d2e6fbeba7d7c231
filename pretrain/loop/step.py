"""One optimizer step, and one validation pass, by megatron-core's schedules.

In shapes s is the number of tokens of a sequence that a rank has: seq_length / context_parallel_size.
"""

import collections
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ladder.layers.attention.documents import Documents
from megatron_ladder.losses.distillation import distilled_losses
from megatron_ladder.losses.z_loss import cross_entropy_and_log_z
from pretrain.config.train import TrainConfig
from pretrain.data.batches import Batch, Batches, to_device
from pretrain.model.graphs import StepGraph
from pretrain.model.routers import biases_of, restore
from pretrain.optim.optimizer import gradient_norm, update


def _masked_sum(
    config: TrainConfig, batch: Batch, output: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch for backward, and the sums for the log.

    Args:
        output: each token's cross-entropy, [b, s]; with a teacher or z-loss, logits
            [b, s, vocabulary / tp].

    Returns:
        The losses of the trained tokens, summed and multiplied by the batch's `scale`, a scalar; and what
        `_counted` returns, with z-loss also its sum, an fp64 scalar.
    """
    trained = cross_entropy = output
    z_loss = None
    if coefficient := config.optimizer.z_loss_coeff:
        cross_entropy, log_z = cross_entropy_and_log_z(
            output, batch["labels"], parallel_state.get_tensor_model_parallel_group()
        )
        z_loss = coefficient * log_z.square()
        trained = cross_entropy + z_loss
    if "teacher_logits" in batch:
        trained, cross_entropy = distilled_losses(
            output,
            batch["teacher_logits"],
            batch["labels"],
            weight=config.adapt.distillation_weight,
            temperature=config.adapt.distillation_temperature,
            group=parallel_state.get_tensor_model_parallel_group(),
        )
    total = (trained.float() * batch["loss_mask"]).sum()
    sums = {"sum": _counted(batch, cross_entropy)}
    if z_loss is not None:
        sums["z_loss"] = (z_loss.detach().double() * batch["loss_mask"]).sum()
    return total * batch["scale"], sums


def _counted(batch: Batch, cross_entropy: Tensor) -> Tensor:
    """The summed cross-entropy of a micro-batch's trained tokens, and their number: fp64 [2].

    Args:
        cross_entropy: of each token, [b, s], in nats.
    """
    loss_mask = batch["loss_mask"]
    exact = (cross_entropy.detach().double() * loss_mask).sum()
    return torch.stack([exact, loss_mask.double().sum()])


def _measured(batch: Batch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return output.new_zeros(()), {"sum": _counted(batch, output)}


def _logits(batch: Batch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return output.new_zeros(()), {"logits": output}


def _forward(
    reduce: Callable, wants_logits: bool, batches: Iterator[Batch], model: Any
) -> tuple[Tensor, Callable]:
    """The forward step that megatron-core's schedules call.

    Returns:
        On the last stage, per-token losses [b, s], or logits [b, s, vocabulary / tp]; on other stages the
        output for the next stage. And the function that sums the losses; only the last stage calls it.
    """
    read = next(batches)
    batch = to_device(read)
    documents = Documents(read["documents"]) if "documents" in read else None
    # A stage between the first and the last one has no tokens (data/reading.py): it gets hidden states.
    labels = None if wants_logits else batch.get("labels")
    output = model(
        *(batch.get("tokens"), batch.get("position_ids"), None),
        labels=labels,
        packed_seq_params=documents,
    )
    return output, partial(reduce, batch)


def _run_schedule(
    model: list[Any],
    micro_batches: list[Batch],
    config: TrainConfig,
    reduce: Callable,
    *,
    forward_only: bool,
    wants_logits: bool = False,
) -> list[dict[str, Tensor]]:
    """Runs all micro-batches through all pipeline stages.

    Returns:
        What `reduce` returned for the log: on the last stage one entry a micro-batch, on others none.
    """
    return get_forward_backward_func()(
        forward_step_func=partial(_forward, reduce, wants_logits),
        data_iterator=[iter(micro_batches) for _ in model],
        model=model,
        num_microbatches=len(micro_batches),
        seq_length=config.data.seq_length,
        micro_batch_size=config.micro_batch_size,
        forward_only=forward_only,
    )


def forward_logits(
    model: list[Any], micro_batches: list[Batch], config: TrainConfig
) -> list[Tensor]:
    """The logits of every micro-batch, [b, s, vocabulary / tp], on the last stage; [] on other stages."""
    outputs = _run_schedule(
        model, micro_batches, config, _logits, forward_only=True, wants_logits=True
    )
    return [output["logits"] for output in outputs]


def backward_only(model: list[Any], micro_batches: list[Batch], config: TrainConfig) -> None:
    """Forward and backward of the mean cross-entropy of each micro-batch, without an update.

    Args:
        model: this rank's chunks, not in DDP: gradients stay with their parameters.
    """
    count = len(micro_batches)
    one = torch.ones(())  # stages without labels compute no loss
    counted = [b["loss_mask"].sum() if "loss_mask" in b else one for b in micro_batches]
    scaled = [{**b, "scale": count / n} for b, n in zip(micro_batches, counted, strict=True)]
    alone = replace(config, optimizer=replace(config.optimizer, z_loss_coeff=0.0))
    _run_schedule(model, scaled, config, partial(_masked_sum, alone), forward_only=False)


def _sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of `x` over data- and context-parallel ranks and pipeline stages, in place.

    All stages but the last must hold zeros.
    """
    torch.distributed.all_reduce(x, group=parallel_state.get_data_parallel_group(True))
    torch.distributed.all_reduce(x, group=parallel_state.get_pipeline_model_parallel_group())
    return x


def train_step(
    model: list[Any],
    optimizer: Any,
    scheduler: Any,
    batches: Iterator[Batch],
    config: TrainConfig,
    add_teacher_logits: Callable[[list[Batch]], None] | None = None,
    is_good: Callable[[float, float, list[Tensor], list[Any]], bool] | None = None,
    graph: StepGraph | None = None,
    step: int | None = None,
) -> tuple[float, float, float, float]:
    """Forward and backward of one global batch, then an update.

    Args:
        add_teacher_logits: adds the teacher's logits to the micro-batches (Teacher.add_logits).
        is_good: called before the update with the loss, the gradient norm, the sums and the model
            (BadSteps.is_good). Where it returns False, the update is left out. Every rank calls it and
            must get the same answer.
        graph: the run's CUDA graph of forward and backward (graphs.py); None: they run without one.
        step: its number, which decides the batch size in a ramp. None: the whole batch.

    Returns:
        (mean cross-entropy of the trained tokens of the global batch in nats, gradient norm before
        clipping, learning rate, mean z-loss that was trained beside the cross-entropy; 0 without).
    """
    data_parallel_size = parallel_state.get_data_parallel_world_size()
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    biases = biases_of(model)
    count = config.num_microbatches(data_parallel_size, step)
    micro_batches = list(itertools.islice(batches, count))
    tokens = _trained_tokens(micro_batches)
    # Each token has the same weight, whichever micro-batch or rank it is in. So the sum is divided by the
    # number of all tokens, and multiplied by what the schedule (micro-batches) and DDP (ranks) divide by.
    # DDP divides by the context-parallel ranks too, and the schedule multiplies by their number.
    # The scale is a tensor of the batch, since a number that changes from step to step cannot be part of
    # a CUDA graph.
    scale = (count * data_parallel_size / tokens).float()
    micro_batches = [{**batch, "scale": scale} for batch in micro_batches]
    if add_teacher_logits:
        add_teacher_logits(micro_batches)
    forward_backward = partial(
        _run_schedule,
        model,
        config=config,
        reduce=partial(_masked_sum, config),
        forward_only=False,
        wants_logits=add_teacher_logits is not None or bool(config.optimizer.z_loss_coeff),
    )
    outputs = (
        graph.run(forward_backward, micro_batches) if graph else forward_backward(micro_batches)
    )
    scheduler.step(increment=1)  # before the update, so that step 1 has the learning rate of step 1
    learning_rate = optimizer.param_groups[0]["lr"]
    total = torch.zeros(3, dtype=torch.float64, device=torch.cuda.current_device())
    for output in outputs:
        total[:2] += output["sum"]
        total[2] += output.get("z_loss", 0.0)
    _sum_over_ranks(total)
    # This is the only place where the host waits for the GPU. It waits at each number that it reads from
    # the GPU, and until it launches more work the GPU is idle. So such reads are all made here.
    grad_norm = gradient_norm(optimizer)
    loss_sum, counted, z_sum = total.tolist()
    loss, z_loss = loss_sum / max(counted, 1.0), z_sum / max(counted, 1.0)
    sums = [output["sum"] for output in outputs]
    if is_good is None or is_good(loss, grad_norm, sums, model):
        update(optimizer, grad_norm)
    else:
        restore(biases)
    return loss, grad_norm, learning_rate, z_loss


def pass_over(scheduler: Any, batches: Iterator[Batch], config: TrainConfig, step: int) -> None:
    """Does a step without training: its data is skipped, and the learning rate moves on by a step."""
    count = config.num_microbatches(parallel_state.get_data_parallel_world_size(), step)
    collections.deque(itertools.islice(batches, count), maxlen=0)
    scheduler.step(increment=1)


def _trained_tokens(micro_batches: list[Batch]) -> Tensor:
    """The number of labels of the global batch that are trained on; 1 when there are none: fp64, a scalar.

    The batches are whole: context-parallel ranks have not cut their tokens of them, and count the same.
    It is 1 on stages that have no labels, which compute no loss. Nothing waits for the device: labels on
    the host are counted there, and the sum over the ranks is queued behind the update before.
    """
    count = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
    for batch in micro_batches:
        if "loss_mask" in batch:
            count += batch["loss_mask"].sum()
    torch.distributed.all_reduce(count, group=parallel_state.get_data_parallel_group())
    return count.clamp(min=1.0)


PART = 8
"""Micro-batches a pipeline stage that a validation does before all ranks look at the checkpoint."""


@torch.no_grad()
def validate(
    model: list[Any],
    batches: Batches,
    config: TrainConfig,
    between: Callable[[], object] | None = None,
    received: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
) -> float:
    """The mean cross-entropy over all ranks' batches, in nats a token. Every rank calls it and gets it.

    Args:
        between: called after each part of the batches, by every rank equally often: a checkpoint that is
            being written must not wait for the end of a long validation (CheckpointSaver.complete).
        received: makes micro-batches of what this rank has read (RankBatches.received).
    """
    here = torch.cuda.current_device()
    total = torch.zeros(2, dtype=torch.float64, device=here)
    width = PART * config.parallel.pipeline_model_parallel_size
    parts = torch.tensor(math.ceil(len(batches) / width), device=here)
    torch.distributed.all_reduce(parts, torch.distributed.ReduceOp.MAX)
    for chunk in model:
        chunk.eval()
    left = iter(batches)
    with _scales_kept(model, config):
        for _ in range(int(parts)):
            # Made and received a part at a time: the whole split may not fit in memory.
            if part := list(received(itertools.islice(left, width))):
                for output in _run_schedule(model, part, config, _measured, forward_only=True):
                    total += output["sum"]
            if between:
                between()
    for chunk in model:
        chunk.train()
    _sum_over_ranks(total)
    return (total[0] / total[1]).item()


def _scales_kept(model: list[Any], config: TrainConfig) -> AbstractContextManager[None]:
    """Within the `with`, forward passes do not change the scales of FP8 that training goes on with.

    A run that goes on after a validation, and one that is resumed from a checkpoint before it, must be the
    same.
    """
    if config.fp8.recipe != "delayed":
        return nullcontext()
    from megatron_ladder.te.scales import scales_kept

    return scales_kept(model)
