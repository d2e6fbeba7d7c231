"""The beginning of a side-tuned run: the backbone's weights, and the first weights of its side network."""

import itertools
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_ladder.side.model import SideTunedModel
from megatron_ladder.side.prune import WEIGHTS, Importance, layers_of, magnitudes, prune
from pretrain.config.train import TrainConfig
from pretrain.data.batches import Batch
from pretrain.data.reading import RankBatches
from pretrain.loop.step import backward_only
from pretrain.run.checkpoint import load_initial_weights, model_chunks
from pretrain.run.folder import backbone_of, keep_backbone, latest_checkpoint
from pretrain.start.initial import initial_checkpoint


def load_backbone(config: TrainConfig, model: list[Any]) -> None:
    """Loads the backbone's weights. At the run's first start they are kept in its folder before.

    Called by all ranks.

    Args:
        model: from `build`.
    """
    assert config.output_dir is not None and config.init_from is not None
    # A run that was killed in its first start has one: a newer checkpoint of the other run is not taken.
    kept = [latest_checkpoint(backbone_of(config.output_dir)) is not None]
    dist.broadcast_object_list(kept)
    if not kept[0]:
        checkpoint = initial_checkpoint(config.init_from)
        if dist.get_rank() == 0:
            keep_backbone(config.output_dir, checkpoint)
        dist.barrier()
    backbones = {name: chunk.backbone for name, chunk in model_chunks(model).items()}
    load_initial_weights(initial_checkpoint(backbone_of(config.output_dir)), backbones)


def start_side(config: TrainConfig, model: list[Any], optimizer: Any, data: RankBatches) -> None:
    """Prunes the backbone to the side network's first weights, if the run asks for it. Called by all ranks.

    Args:
        model: from `build`, with the backbone's weights.
        data: the first global batch measures the importance of weights.
    """
    chunks = list(model_chunks(model).values())
    if config.side.start == "random":
        return
    if config.side.start == "magnitude":
        importance = magnitudes(chunks)
    else:
        size = dist.get_world_size()
        count = config.num_microbatches(config.parallel.data_parallel_size(size), 1)
        batches = data.received(data.training(0))
        importance = fisher(chunks, list(itertools.islice(batches, count)), config)
    prune(chunks, importance)
    optimizer.reload_model_params()


def fisher(
    chunks: list[SideTunedModel], micro_batches: list[Batch], config: TrainConfig
) -> Importance:
    """The importance of the backbone's weights: their squared gradients, summed over micro-batches.

    A gradient is summed up by channels as soon as it is there, and freed. So beside activations this takes
    the memory of one matrix. Called by all ranks.
    """
    found = Importance(chunks)

    def take(layer: int, name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        found.add(layer, name, weight.grad.float().square())
        weight.grad = None

    weights, hooks = [], []
    for number, layer in layers_of(chunks):
        for name in WEIGHTS:
            weight = layer.get_parameter(name).requires_grad_(True)
            weights.append(weight)
            hooks.append(weight.register_post_accumulate_grad_hook(partial(take, number, name)))
    for chunk in chunks:
        if chunk.pre_process:
            # Ladder layers bring a gradient to their input, even to the first one.
            hooks.append(chunk.backbone.embedding.register_forward_hook(_with_gradient))
    backward_only([chunk.backbone for chunk in chunks], micro_batches, config)
    for hook in hooks:
        hook.remove()
    for weight in weights:
        weight.requires_grad_(False)
    found.sum_over_ranks(over_data=True)
    return found


def _with_gradient(_: Any, __: Any, output: Tensor) -> Tensor:
    return output.requires_grad_()
