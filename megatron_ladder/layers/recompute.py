"""Full recomputation, one sub-module at a time, so that backward's overlap stays what it is.

megatron-core's wraps a whole layer, whose backward cannot begin before the layer's output gradient
is complete: nothing would be left to hide that behind. Here each sub-module keeps only its input
(with sequence parallelism this rank's shard of it) and computes the rest again. The collective of
its output lies outside and is not repeated.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.random import (
    _fork_rng,
    _get_all_rng_states,
    _set_all_rng_states,
)
from torch import Tensor

from megatron_ladder.collectives.placeholder import fp8_of, standing_for
from megatron_ladder.collectives.points import SubmoduleCollectives, collectives_of, take_part
from megatron_ladder.te.recompute import Fp8Region

Submodule = Callable[[Tensor], Tensor]


def recomputed(submodule: Submodule, x: Tensor) -> Tensor:
    """`submodule(x)`, whose activations are computed again in backward.

    Args:
        x: [s, b, h], from `input_wait`.

    Dropout draws the same numbers the second time: megatron-core's random states, those of the
    tensor-parallel ranks too, are put back.
    """
    if not torch.is_grad_enabled():
        return submodule(x)
    call = _Call(submodule)
    output = _SubmoduleBackward.apply(x, call)
    kept = standing_for(x.detach(), fp8_of(x))
    return _RecomputeFirst.apply(output, kept, collectives_of(x), call)


def numbers_drawn() -> None:
    """To be called when something inside a sub-module's forward, which is not part of it, has drawn
    random numbers: recomputation begins after them. Nothing of the sub-module may be before it."""
    if _running is not None:
        _running.rng_states = _get_all_rng_states()


class _Call:
    """What the two nodes of one call share."""

    def __init__(self, submodule: Submodule) -> None:
        self.submodule = submodule
        self.rng_states = _get_all_rng_states()
        self.fp8 = Fp8Region()
        self.again: tuple[Tensor, Tensor] | None = None
        """The recomputed sub-module's input and output, between the two nodes' backward."""


_running: _Call | None = None


class _SubmoduleBackward(torch.autograd.Function):
    """Forward: the sub-module, recording nothing. Backward: that of the recomputed sub-module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call) -> Tensor:
        global _running
        ctx.call = _running = call
        try:
            with call.fp8.forward():
                return call.submodule(x)
        finally:
            _running = None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        assert ctx.call.again is not None
        (x, output), ctx.call.again = ctx.call.again, None
        torch.autograd.backward(output, grads[0])
        return x.grad, None  # None when it is in flight already


class _RecomputeFirst(torch.autograd.Function):
    """Forward: identity. Backward: recomputes. A node of its own, so that autograd can run what
    was recorded inside the sub-module (with sequence parallelism, layer.py) between the two."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, collectives: SubmoduleCollectives | None, call: _Call
    ) -> Tensor:
        ctx.call, ctx.collectives = call, collectives
        gathers = collectives is not None and collectives.gather_input_again(for_forward=True)
        ctx.fp8 = None if gathers else fp8_of(x)
        if ctx.fp8 is not None:
            ctx.fp8.keep(rows=True)
        ctx.save_for_backward(*(() if gathers else (x,)))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        call, collectives = ctx.call, ctx.collectives
        fp8, ctx.fp8 = ctx.fp8, None
        x = ctx.saved_tensors[0] if ctx.saved_tensors else collectives.wait_input_again()
        x = standing_for(x.detach().requires_grad_(), fp8 or fp8_of(x))
        take_part(x, collectives)
        with _fork_rng():
            _set_all_rng_states(*call.rng_states)
            with call.fp8.again(), torch.enable_grad():
                call.again = x, call.submodule(x)
        return grads[0], None, None, None
