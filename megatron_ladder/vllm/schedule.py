"""When a layer starts each of its all-reduces, and when it waits for it: as models serve, forward only.

A ladder layer's sum is under way while the sub-module after it computes, across layers too:

    compute      attention 1 | MLP 1       | attention 2 | MLP 2       | ...
    all-reduce               | attention 1 | MLP 1       | attention 2 | MLP 2

The states are those of hf/modeling_ladder.py: `a`, the residual stream after the attention, and `m`,
after the MLP; here each [tokens, hidden].
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

SubModule = Callable[[Tensor], Tensor]
"""From a state that is whole to this rank's part of the output: the norm is in it, the sum is not."""


class InFlight(NamedTuple):
    """A sum over the ranks that is under way: to be passed on, not to be read or written."""

    partial: Tensor
    total: Tensor


class Sums(Protocol):
    """Sums of partial outputs over the tensor-parallel ranks."""

    def at_once(self, partial: Tensor) -> Tensor: ...

    def start(self, partial: Tensor) -> InFlight: ...

    def finish(self, residual: Tensor, output: InFlight) -> Tensor:
        """`residual` plus the sum, which is waited for."""
        ...


class State(NamedTuple):
    """What goes from layer to layer. `a` is always whole; of the other two one is None."""

    a: Tensor
    m: Tensor | None
    mlp: InFlight | None
    """m = a + mlp, once that has arrived."""


def whole(state: State, sums: Sums) -> tuple[Tensor, Tensor]:
    """`a` and `m`, the MLP's sum waited for."""
    if state.mlp is not None:
        return state.a, sums.finish(state.a, state.mlp)
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
    """One sum for both."""
    _, m = whole(state, sums)
    m = m + sums.at_once(attention_and_mlp(m))
    return State(m, m, None)
