"""The serving model's two operators over gloo, on two ranks: their sum, and that the first one returns
before the sum is there. vLLM is not needed."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ladder.vllm.all_reduce import AllReduce
from megatron_ladder.vllm.schedule import State, ladder_layer, whole
from tests.ranks import run_ranks

WIDTH, LAYERS = 8, 3


def summed(partial: Tensor) -> Tensor:
    dist.all_reduce(partial)
    return partial


def sums() -> AllReduce:
    return AllReduce(dist.group.WORLD.group_name, summed)


def layers(x: Tensor, weights: Tensor, sums: AllReduce) -> Tensor:
    """x: [tokens, WIDTH]; weights: this rank's, [LAYERS, 2, WIDTH, WIDTH]."""
    state = State(x, x, None)
    for first, second in weights:
        state = ladder_layer(state, lambda x, w=first: x @ w, lambda x, w=second: x.sin() @ w, sums)
    return whole(state, sums)[1]


@torch.inference_mode()
def run_layers(compiled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What comes out, the input, this rank's weights."""
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    own = torch.Generator().manual_seed(1 + dist.get_rank())
    weights = torch.randn(LAYERS, 2, WIDTH, WIDTH, generator=own) / WIDTH
    function = torch.compile(layers, fullgraph=True, backend="aot_eager") if compiled else layers
    return function(x, weights, sums()), x, weights


@pytest.mark.parametrize("compiled", [False, True])
def test_the_sums_are_those_of_one_rank_with_all_weights(compiled: bool, tmp_path: Path) -> None:
    ranks = run_ranks(2, run_layers, compiled, tmp_path=tmp_path)
    x = ranks[0][1]
    whole_weights = ranks[0][2] + ranks[1][2]
    expected = layers(x, whole_weights, AllReduce(None, summed))
    for found, _, _ in ranks:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def start_before_the_other_rank() -> list[float]:
    """Rank 1 starts only after word from rank 0, which rank 0 sends between its start and its wait."""
    words = dist.new_group(timeout=timedelta(seconds=60))
    rank, word = dist.get_rank(), torch.zeros(1)
    partial, residual = torch.full((4,), 1.0 + rank), torch.full((4,), 10.0)
    if rank == 1:
        dist.recv(word, src=0, group=words)
    output = sums().start(partial)
    before = partial.clone()
    if rank == 0:
        dist.send(word, dst=1, group=words)
    result = sums().finish(residual, output)
    assert torch.equal(before, torch.full((4,), 1.0 + rank)), "the partial output was overwritten"
    # Where a captured graph of vLLM's expects it: see all_reduce.py.
    assert result.data_ptr() == partial.data_ptr()
    return result.tolist()


def test_a_start_does_not_wait_for_the_sum(tmp_path: Path) -> None:
    """A start that waited would hang: the other rank has not begun."""
    assert run_ranks(2, start_before_the_other_rank, tmp_path=tmp_path) == [[13.0] * 4] * 2
