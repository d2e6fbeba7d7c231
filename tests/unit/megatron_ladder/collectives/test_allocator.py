"""Memory that another stream uses is not given out again: held to a stand-in for CUDA's allocator."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ladder.collectives import names, streams
from megatron_ladder.collectives.flight import used_here
from megatron_ladder.collectives.points import (
    SubmoduleCollectives,
    collectives_of,
    input_start,
    input_wait,
    output_start,
    output_wait,
)
from megatron_ladder.config import PARALLEL, Residual
from megatron_ladder.layers.halves import calls_of, join, split
from megatron_ladder.layers.layer import LadderTransformerLayer
from tests.unit.megatron_ladder.collectives.cuda_allocator import (
    Allocator,
    Collectives,
    Stream,
    pretend_there_is_a_gpu,
)

SIDE = Stream("side")


class TwoRanks:
    def size(self) -> int:
        return 2


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Allocator]:
    allocator = Allocator()
    pretend_there_is_a_gpu(monkeypatch, allocator)
    collectives = Collectives(allocator)
    for name in (names.ALL_GATHER, names.REDUCE_SCATTER, "all_reduce"):
        monkeypatch.setattr(dist, name, collectives.start)
    streams._second_stream.cache_clear()
    with allocator:
        yield allocator
    streams._second_stream.cache_clear()


def test_the_stand_in_notices(allocator: Allocator) -> None:
    x = torch.ones(3)
    x + 1
    allocator.check()
    with allocator.on(SIDE):
        y = x + 1
    with pytest.raises(AssertionError, match="of stream main is used on side"):
        allocator.check()
    with allocator.on(SIDE):
        used_here(x)
    allocator.check()
    y[1:] + 1
    with pytest.raises(AssertionError, match="of stream side is used on main"):
        allocator.check()
    used_here(y[:1])  # a view has the memory of the whole
    allocator.check()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_each_collective_may_be_waited_for_on_another_stream(
    allocator: Allocator, sequence_parallel: bool
) -> None:
    """What it reads too: when the wait is over nobody else holds that."""
    group: Any = TwoRanks()
    submodule = SubmoduleCollectives(group, sequence_parallel)

    def whole() -> Tensor:
        return torch.ones(4, 1, 4)

    def part() -> Tensor:
        return torch.ones(2 if sequence_parallel else 4, 1, 4)

    def waited(result: Tensor) -> None:
        result + 1
        allocator.check()

    if sequence_parallel:  # else the input needs no collective
        x = submodule.start_input(part())
        with allocator.on(SIDE):
            submodule.wait_input()
            waited(x)
        assert submodule.gather_input_again()
    y = submodule.start_output(whole())
    with allocator.on(SIDE):
        submodule.wait_output()
        waited(y)
    if sequence_parallel:
        submodule.start_output_gradient(part())
        with allocator.on(SIDE):
            waited(submodule.wait_output_gradient())
            waited(submodule.wait_input_again())
    submodule.start_input_gradient(whole().transpose(0, 2))  # copied first
    with allocator.on(SIDE):
        waited(submodule.wait_input_gradient())


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("starts_beside", [False, True])
def test_a_submodule_between_two_streams(
    allocator: Allocator, sequence_parallel: bool, starts_beside: bool
) -> None:
    """The points in the layer's order, forward: the chain is on one stream, the sub-module on the other."""
    group: Any = TwoRanks()
    chain, compute = (SIDE, allocator.main) if starts_beside else (allocator.main, SIDE)
    with allocator.on(chain), torch.no_grad():
        x = input_start(torch.ones(2, 1, 4), group, sequence_parallel)
        with allocator.on(compute):
            x = input_wait(x)
            y = output_start(x @ torch.ones(4, 4), collectives_of(x))
        # The chain waits for the output and adds it to the residual state.
        y = output_wait(y)
        y + torch.ones(1)
    allocator.check()


def test_an_output_that_was_waited_for_on_another_stream(allocator: Allocator) -> None:
    group: Any = TwoRanks()
    with allocator.on(SIDE):
        x = input_wait(input_start(torch.ones(2, 1, 4, requires_grad=True), group, True))
        y = output_start(x * 2, collectives_of(x))
        submodule = collectives_of(y)
        assert submodule is not None
        submodule.wait_output()
    output_wait(y) + 1
    allocator.check()


def test_the_second_stream(allocator: Allocator) -> None:
    residual, norm = torch.ones(4), torch.ones(4)
    since = streams.moment()
    with streams.beside(since, residual, None, norm):
        assert allocator.current.name == "second"
        out = residual * norm
    assert allocator.current is allocator.main
    streams.rejoin(out, None)
    out + 1
    allocator.check()


class Layer(LadderTransformerLayer):
    """The layer's own order, around sub-modules of a few operations."""

    def __init__(self, group: Any, residual: Residual, halves: bool) -> None:
        torch.nn.Module.__init__(self)
        self.residual, self.halves = residual, halves
        self.submodules = ("both",) if residual in PARALLEL else ("attention", "mlp")
        self._calls = calls_of(self.submodules, halves)
        self._chain = []
        self.tp_group, self.in_fp8 = group, False
        self.config: Any = SimpleNamespace(sequence_parallel=True)
        self.next_layer = ()
        self.residual_scales = (None,) * len(self.submodules)
        self.is_moe_layer = False

    def _start_submodule(self, name: Any, x: Tensor, behind: Any = None) -> Tensor:
        return input_start(x * 2, self.tp_group, True)

    def _compute(self, name: Any, x: Tensor, **_: Any) -> Tensor:
        x = x @ torch.ones(4, 4)
        if name != "attention" or self.submodules != ("both",):
            self._run_chain()  # as hook of the first linear
        return x @ torch.ones(4, 4)

    def _add(self, residual: Tensor, output: Tensor) -> Tensor:
        return residual + output_wait(output)


@pytest.mark.parametrize(
    ("residual", "halves"),
    [
        ("ladder", False),
        ("parallel-ladder", False),
        ("standard", True),
        ("parallel", True),
    ],
)
def test_layers_on_two_streams(allocator: Allocator, residual: Residual, halves: bool) -> None:
    """Two layers and the end of a stage; of halves the chain is the other half's."""
    layers = [Layer(TwoRanks(), residual, halves) for _ in range(2)]
    layers[0].next_layer = (layers[1],)
    with torch.no_grad():
        x = torch.ones(2, 2, 4)
        states, y = split(x) if halves else (x,), None
        for layer in layers:
            y, states = layer._hiding(states, y, {"attention_mask": None})
        *complete, a = states
        assert join((*complete, layers[1]._add(a, y))).shape == (2, 2, 4)
    assert {stream.name for m in allocator._memory.values() for stream in m.used_on} == {
        *("main", "second")
    }
    allocator.check()
