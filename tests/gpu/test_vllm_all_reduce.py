"""The serving model's two operators on a CUDA device, eager and in a CUDA graph; vLLM's all-reduce is a
slow stand-in that doubles, as if there were two equal ranks."""

import pytest
import torch
from torch import Tensor

from megatron_ladder.vllm.all_reduce import AllReduce
from megatron_ladder.vllm.schedule import InFlight, State, Sums, ladder_layer, whole
from tests.unit.vllm import stand_in

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LAYERS, WIDTH = 8, 256


def slowly_doubled(partial: Tensor) -> Tensor:
    """Late, so that who does not wait for it reads something else."""
    total = torch.zeros_like(partial)
    torch.cuda._sleep(1_000_000)
    return total.add_(partial, alpha=2)


class Doubled:
    def at_once(self, partial: Tensor) -> Tensor:
        return partial * 2

    def start(self, partial: Tensor) -> InFlight:
        return InFlight(partial, partial * 2)

    def finish(self, residual: Tensor, output: InFlight) -> Tensor:
        return residual + output.total


def layers(x: Tensor, weights: Tensor, sums: Sums) -> Tensor:
    state = State(x, x, None)
    for first, second in weights:
        state = ladder_layer(state, lambda x, w=first: x @ w, lambda x, w=second: x.sin() @ w, sums)
    return whole(state, sums)[1]


@torch.inference_mode()
@pytest.mark.parametrize("captured", [False, True])
def test_sums_arrive_before_they_are_read(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(monkeypatch, slowly_doubled, lambda: False)
    weights = torch.randn(LAYERS, 2, WIDTH, WIDTH, device="cuda") / WIDTH
    x = torch.zeros(16, WIDTH, device="cuda")
    sums = AllReduce("two equal ranks", slowly_doubled)
    found = layers(x, weights, sums)
    if captured:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            found = layers(x, weights, sums)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        if captured:
            graph.replay()
        else:
            found = layers(x, weights, sums)
        torch.testing.assert_close(found, layers(x, weights, Doubled()))
