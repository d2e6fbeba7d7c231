"""The order of sub-modules, starts of all-reduces, and waits in a layer, for inference (forward only).

In ladder layers each sum is in flight while the next sub-module computes, also from one layer to the next:

    compute      attention 1 | MLP 1       | attention 2 | MLP 2       | ...
    all-reduce               | attention 1 | MLP 1       | attention 2 | MLP 2

A parallel-ladder layer has one sum, of attention and MLP together. It is in flight while the whole next
layer computes:

    compute      attention 1, MLP 1 | attention 2, MLP 2 | ...
    all-reduce                      | attention 1, MLP 1 | ...

The states are those of modeling_ladder.py: `m` is the residual stream, and `a` the residual stream without
the last output. Both are [tokens, hidden].
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

SubModule = Callable[[Tensor], Tensor]
"""Complete state [tokens, hidden] -> this rank's partial output. It includes the norm, not the sum."""


class InFlight(NamedTuple):
    """A sum over the ranks that is in flight. Code may pass it on, but must not read or write it."""

    partial: Tensor
    total: Tensor


class Sums(Protocol):
    """Sums of partial outputs over the tensor-parallel ranks."""

    def at_once(self, partial: Tensor) -> Tensor: ...

    def start(self, partial: Tensor) -> InFlight: ...

    def finish(self, residual: Tensor, output: InFlight) -> Tensor:
        """Waits for the sum, and returns `residual` plus the sum."""
        ...


class State(NamedTuple):
    """The states that a layer passes to the next. `a` is always complete. One of `m` and `last` is None."""

    a: Tensor
    m: Tensor | None
    last: InFlight | None
    """The last output, in flight: m = a + last. It is the MLP's, or of parallel kinds the layer's."""


def whole(state: State, sums: Sums) -> tuple[Tensor, Tensor]:
    """Waits for the last output's sum if it is in flight, and returns `a` and `m`, both complete."""
    if state.last is not None:
        return state.a, sums.finish(state.a, state.last)
    assert state.m is not None
    return state.a, state.m


def ladder_layer(state: State, attention: SubModule, mlp: SubModule, sums: Sums) -> State:
    attention_output = sums.start(attention(state.a))
    _, m = whole(state, sums)
    mlp_output = sums.start(mlp(m))
    return State(sums.finish(m, attention_output), None, mlp_output)


def standard_layer(state: State, attention: SubModule, mlp: SubModule, sums: Sums) -> State:
    _, m = whole(state, sums)
    a = m + sums.at_once(attention(m))
    return State(a, a + sums.at_once(mlp(a)), None)


def parallel_layer(state: State, attention_and_mlp: SubModule, sums: Sums) -> State:
    """A parallel layer has one sum for attention and MLP together."""
    _, m = whole(state, sums)
    return State(m, m + sums.at_once(attention_and_mlp(m)), None)


def parallel_ladder_layer(state: State, attention_and_mlp: SubModule, sums: Sums) -> State:
    output = sums.start(attention_and_mlp(state.a))
    _, m = whole(state, sums)
    return State(m, None, output)
