"""Some training steps with and without a graph of forward and backward, for tests that compare them."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_ladder.mcore_compat import destroy_model_parallel, initialize_model_parallel
from pretrain.config.presets import PRESETS
from pretrain.config.train import TrainConfig
from pretrain.loop.step import train_step, validate
from pretrain.model.graphs import WARM_UP_STEPS, StepGraph
from pretrain.model.setup import build
from pretrain.optim.optimizer import gathered_parameters
from tests.recorded_graph import RecordedGraph, recorded

STEPS = WARM_UP_STEPS + 3
SKIPPED = WARM_UP_STEPS + 1
"""A replayed step that does not change the weights, with a validation after it."""


def config(residual: str = "ladder", **changes: Any) -> TrainConfig:
    debug = PRESETS["debug"]()
    model = replace(debug.model, vocab_size=128, num_layers=3, residual=residual)
    small = {
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "data": replace(debug.data, seq_length=32),
    }
    return replace(debug, model=model, **{**small, **changes})


def random_batches(config: TrainConfig) -> Iterator[dict]:
    """None like another, nor its number of trained tokens."""
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    shape = (config.micro_batch_size, config.data.seq_length)
    while True:
        tokens = torch.randint(0, 128, shape, generator=generator)
        share = torch.rand((), generator=generator)
        batch = {
            "tokens": tokens,
            "labels": tokens.roll(-1, 1),
            "loss_mask": (torch.rand(shape, generator=generator) < share).float(),
            "position_ids": torch.arange(shape[1]).expand(shape),
        }
        yield batch


def run(config: TrainConfig) -> tuple[list[Any], list[Tensor]]:
    """Figures of steps and their micro-batches, with a validation among them; the weights at their end.

    With a CUDA graph over NCCL, else with its stand-in.
    """
    with_cuda = torch.distributed.get_backend() == "nccl"
    destroy_model_parallel()
    initialize_model_parallel(config.parallel, seed=0, for_graphs=with_cuda)
    if config.fp8.recipe:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()  # it keeps the layers of the run before
    built = build(config)
    with contextlib.nullcontext() if with_cuda else _stand_in():
        return _trained(config, *built)


@contextlib.contextmanager
def _stand_in() -> Iterator[None]:
    cuda: Any = torch.cuda
    cuda.CUDAGraph, cuda.graph = RecordedGraph, recorded
    tracker = get_cuda_rng_tracker()
    # It compares the host's random state with itself, which waits for no GPU.
    with mock.patch.object(tracker, "fork", return_value=contextlib.nullcontext()):
        yield


def _trained(
    config: TrainConfig, model: list[Any], optimizer: Any, scheduler: Any
) -> tuple[list[Any], list[Tensor]]:
    batches = random_batches(config)
    held_out = list(itertools.islice(random_batches(config), 2))
    graph = StepGraph(model) if config.cuda_graph else None
    figures: list[Any] = []

    def is_good(step: int, _loss: float, _norm: float, sums: list[Tensor], _: list[Any]) -> bool:
        figures.append([x.tolist() for x in sums])
        return step != SKIPPED

    for step in range(STEPS):
        judge = partial(is_good, step)
        figures.append(
            train_step(model, optimizer, scheduler, batches, config, is_good=judge, graph=graph)
        )
        if step == SKIPPED:
            with gathered_parameters(model):
                figures.append(validate(model, held_out, config))
    with gathered_parameters(model):
        return figures, [p.detach().cpu().clone() for p in model[0].module.parameters()]


def both(configs: dict[str, TrainConfig]) -> dict[str, Any]:
    """Of each case what is wrong with its run with a graph, in words: nothing, or what differs."""
    found = {}
    for case, given in configs.items():
        plain, weights = run(replace(given, cuda_graph=False))
        replayed, same_weights = run(replace(given, cuda_graph=True))
        wrong = [] if replayed == plain else [f"{plain} without, {replayed} with a graph"]
        for number, (weight, expected) in enumerate(zip(same_weights, weights, strict=True)):
            if not torch.equal(weight, expected):
                far = (weight - expected).abs().max().item()
                wrong.append(f"weight {number}, {tuple(weight.shape)}: differs by up to {far}")
        found[case] = wrong
    return found
