"""A step's forward and backward, replayed from a graph, train as they do from Python.

The graph is tests/recorded_graph.py's: no CUDA here. tests/gpu/test_graphs.py has CUDA's.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ladder.config import ParallelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.fp8 import Fp8Config
from pretrain.config.profile import ProfileConfig
from pretrain.config.train import AdaptConfig, TrainConfig
from pretrain.model.graphs import check_cuda_graph
from pretrain.run import random_states
from tests.graph_run import both, config
from tests.ranks import run_ranks
from tests.recorded_graph import RecordedGraph, recorded

CASES: dict[int, dict[str, TrainConfig]] = {
    1: {
        "ladder": config(),
        "standard": config("standard"),
        "parallel": config("parallel"),
        "bf16": config(precision="bf16"),
    },
    2: {
        "tp2": config(parallel=ParallelConfig(tensor_model_parallel_size=2)),
        "tp2-sp": config(
            parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
        ),
        "parallel-ladder tp2-sp": config(
            "parallel-ladder",
            parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        ),
        "standard tp2-sp": config(
            "standard",
            parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        ),
        "in halves tp2-sp": config(
            "standard",
            parallel=ParallelConfig(
                tensor_model_parallel_size=2, sequence_parallel=True, tp_overlap="halves"
            ),
        ),
        "parallel-ladder tp2": config(
            "parallel-ladder", parallel=ParallelConfig(tensor_model_parallel_size=2)
        ),
        "dp2": config(global_batch_size=8),
    },
}


@pytest.mark.parametrize("ranks", CASES)
def test_replayed_steps_train_alike(ranks: int, tmp_path: Path) -> None:
    for found in run_ranks(ranks, both, CASES[ranks], tmp_path=tmp_path):
        assert not any(found.values()), found


def test_the_stand_in_keeps_numbers_and_refuses_what_cuda_does() -> None:
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
    del x
    with pytest.raises(RuntimeError, match=r"memory of \(3,\) was given back"):
        graph.replay()
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="the host would wait"), recorded(RecordedGraph()):
        x.sum().item()


def test_a_checkpoint_puts_back_the_numbers_of_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generators themselves stay, as a graph knows them."""
    generator = torch.Generator()
    tracker = SimpleNamespace(
        use_cudagraphable_rng=True, get_states=lambda: {"model-parallel-rng": generator}
    )
    monkeypatch.setattr(random_states, "get_cuda_rng_tracker", lambda: tracker)
    saved = random_states.states()
    assert isinstance(saved["tracker.model-parallel-rng"], torch.Tensor)
    drawn = torch.rand(3, generator=generator)
    random_states.restore(saved)
    assert torch.equal(torch.rand(3, generator=generator), drawn)


def with_model(**changes: Any) -> TrainConfig:
    return replace(config(), model=replace(config().model, **changes))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (config(parallel=ParallelConfig(pipeline_model_parallel_size=2)), "pipeline stages"),
        (
            config(parallel=ParallelConfig(context_parallel_size=2)),
            "context parallelism in a graph",
        ),
        (config(recompute="selective"), "recompute selective puts random states back"),
        (
            config(data=replace(config().data, attend_across_documents=False)),
            "documents' lengths would be captured",
        ),
        (with_model(attention_dropout=0.1), "dropout in a graph is not tested"),
        (
            config(precision="bf16", fp8=Fp8Config(recipe="delayed", primary_weights=True)),
            "fp8.primary_weights may move weights to other memory",
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
