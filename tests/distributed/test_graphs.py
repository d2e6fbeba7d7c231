"""A step's forward and backward, replayed from a graph, train as they do from Python.

The graph is tests/recorded_graph.py's: no CUDA here. tests/gpu/test_graphs.py has CUDA's.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_ladder.config import ParallelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.fp8 import Fp8Config
from megatron_ladder.mcore_compat import destroy_model_parallel, initialize_model_parallel
from pretrain.config import AdaptConfig, TrainConfig
from pretrain.graphs import WARM_UP_STEPS, StepGraph, check_cuda_graph
from pretrain.optimizer import gathered_parameters
from pretrain.presets import PRESETS
from pretrain.profile_config import ProfileConfig
from pretrain.setup import build
from pretrain.step import train_step, validate
from tests.ranks import run_ranks
from tests.recorded_graph import RecordedGraph, recorded

STEPS = WARM_UP_STEPS + 3


def config(residual: str = "ladder", **changes: Any) -> TrainConfig:
    debug = PRESETS["debug"]()
    model = replace(debug.model, vocab_size=128, num_layers=3, residual=residual)
    small = {
        "micro_batch_size": 2,
        "global_batch_size": 8,
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
        if not config.data.attend_across_documents:
            batch["documents"] = torch.randint(0, 2, shape, generator=generator).cumsum(1)
        yield batch


def run(config: TrainConfig) -> tuple[list[Any], list[torch.Tensor]]:
    """Losses and gradient norms of some steps, with a validation among them; the weights at their end."""
    destroy_model_parallel()
    initialize_model_parallel(config.parallel, seed=0)
    model, optimizer, scheduler = build(config)
    # It compares the host's random state with itself, which waits for no GPU.
    get_cuda_rng_tracker().fork = lambda *_: contextlib.nullcontext()
    batches = random_batches(config)
    held_out = list(itertools.islice(random_batches(config), 2))
    graph = StepGraph(model) if config.cuda_graph else None
    figures: list[Any] = []
    for step in range(STEPS):
        figures.append(train_step(model, optimizer, scheduler, batches, config, graph=graph))
        if step == STEPS - 2:
            with gathered_parameters(model):
                figures.append(validate(model, held_out, config))
    with gathered_parameters(model):
        return figures, [p.detach().clone() for p in model[0].module.parameters()]


def both(configs: dict[str, TrainConfig]) -> dict[str, Any]:
    cuda: Any = torch.cuda
    cuda.CUDAGraph, cuda.graph = RecordedGraph, recorded
    return {
        case: [run(replace(given, cuda_graph=on)) for on in (False, True)]
        for case, given in configs.items()
    }


CASES: dict[int, dict[str, TrainConfig]] = {
    1: {
        "ladder": config(),
        "standard": config("standard"),
        "parallel": config("parallel"),
        "bf16": config(precision="bf16"),
        "documents": config(
            data=replace(PRESETS["debug"]().data, seq_length=32, attend_across_documents=False)
        ),
    },
    2: {
        "tp2": config(parallel=ParallelConfig(tensor_model_parallel_size=2)),
        "tp2-sp": config(
            parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
        ),
        "standard tp2-sp": config(
            "standard",
            parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        ),
        "dp2": config(),
    },
}


@pytest.mark.parametrize("ranks", CASES)
def test_replayed_steps_train_alike(ranks: int, tmp_path: Path) -> None:
    for of_rank in run_ranks(ranks, both, CASES[ranks], tmp_path=tmp_path):
        for case, ((plain, weights), (replayed, same_weights)) in of_rank.items():
            assert replayed == plain, case
            for expected, weight in zip(weights, same_weights, strict=True):
                assert torch.equal(weight, expected), case


def test_the_stand_in_keeps_numbers_and_refuses_to_wait() -> None:
    """What a CUDA graph would do wrongly, silently or not, its stand-in does wrongly as well."""
    x, written, graph = torch.ones(3), torch.zeros(3), RecordedGraph()
    factor = 2.0
    with recorded(graph):
        written += factor * x
    assert torch.equal(written, torch.zeros(3))  # nothing is computed while it is captured
    factor = 5.0
    graph.replay()
    assert torch.equal(written, torch.full((3,), 2.0))
    x.fill_(10)
    graph.replay()
    assert torch.equal(written, torch.full((3,), 22.0))
    with pytest.raises(RuntimeError, match="the host would wait"), recorded(RecordedGraph()):
        x.sum().item()


def with_model(**changes: Any) -> TrainConfig:
    return replace(config(), model=replace(config().model, **changes))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (config(parallel=ParallelConfig(pipeline_model_parallel_size=2)), "pipeline stages"),
        (config(recompute="selective"), "recompute selective puts random states back"),
        (with_model(attention_dropout=0.1), "dropout in a graph is not tested"),
        (
            config(precision="bf16", fp8=Fp8Config(recipe="delayed", primary_weights=True)),
            "fp8.primary_weights may come to lie elsewhere",
        ),
        (
            config(init_from=Path("run"), adapt=AdaptConfig(gradual_steps=2)),
            "layers that are turned on later",
        ),
        (
            config(init_from=Path("run"), adapt=AdaptConfig(distillation_weight=0.5)),
            "distillation in a graph",
        ),
        (config(compile=True), "compiled layers in a graph"),
        (config(profile=ProfileConfig(first_step=3)), "no ranges to trace"),
    ],
)
def test_what_is_not_captured_is_refused(
    given: TrainConfig, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_cuda_graph(given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_cuda_graph(config(cuda_graph=True))
    with pytest.raises(UserError, match=f"--cuda-graph: .*{message}.*, or leave --cuda-graph out"):
        check_cuda_graph(replace(given, cuda_graph=True))


def test_a_gpu_is_needed() -> None:
    with pytest.raises(UserError, match="--cuda-graph: there is no GPU"):
        check_cuda_graph(config(cuda_graph=True))
