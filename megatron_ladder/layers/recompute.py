"""Full recomputation, one sub-module at a time, so that backward overlaps as it does without it.

megatron-core's recomputation wraps a whole layer. The backward of such a layer cannot start before the
gradient of the layer's output is complete, so its collective would overlap with nothing. Here each
sub-module keeps only its input (with sequence parallelism this rank's shard of it) and computes the rest
again. The collective of its output is outside the recomputed part and is not repeated.
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

Submodule = Callable[..., Tensor]


def recomputed(submodule: Submodule, x: Tensor, *others: Tensor) -> Tensor:
    """Runs `submodule(x, *others)`. Its activations are not kept: backward computes them again.

    Dropout draws the same numbers the second time, because all of megatron-core's random states, also those
    of single tensor-parallel ranks, are restored.

    Args:
        submodule: attention, MLP or experts, [s, b, h] -> [s, b, h].
        x: [s, b, h], from `input_wait`.
        others: what it reads besides, such as the weights of an expert's tokens.

    Returns:
        [s, b, h].
    """
    if not torch.is_grad_enabled():
        return submodule(x, *others)
    call = _Call(submodule)
    output = _SubmoduleBackward.apply(call, x, *others)
    kept = standing_for(x.detach(), fp8_of(x))
    others = tuple(other.detach() for other in others)
    return _RecomputeFirst.apply(output, collectives_of(x), call, kept, *others)


def numbers_drawn() -> None:
    """Call this in a sub-module's forward after other code has drawn random numbers there.

    Recomputation then starts from the random states after those numbers. The sub-module itself must not
    have drawn any numbers before this call.
    """
    if _running is not None:
        _running.rng_states = _get_all_rng_states()


class _Call:
    """The state that the two autograd nodes of one call share."""

    def __init__(self, submodule: Submodule) -> None:
        self.submodule = submodule
        self.rng_states = _get_all_rng_states()
        self.fp8 = Fp8Region()
        self.again: tuple[tuple[Tensor, ...], Tensor] | None = None
        """The recomputed sub-module's inputs and output, between the two nodes' backward."""


_running: _Call | None = None


class _SubmoduleBackward(torch.autograd.Function):
    """Forward runs the sub-module without recording. Backward runs the recomputed sub-module's backward."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor) -> Tensor:
        global _running
        ctx.call = _running = call
        try:
            with call.fp8.forward():
                return call.submodule(*inputs)
        finally:
            _running = None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.call.again is not None
        (inputs, output), ctx.call.again = ctx.call.again, None
        torch.autograd.backward(output, grads[0])
        return None, *(x.grad for x in inputs)  # None when the gradient is already in flight


class _RecomputeFirst(torch.autograd.Function):
    """Forward is the identity. Backward recomputes the sub-module.

    It is a node of its own, so that autograd can run other nodes between it and `_SubmoduleBackward`: with
    sequence parallelism those that layer.py recorded inside the sub-module.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        collectives: SubmoduleCollectives | None,
        call: _Call,
        x: Tensor,
        *others: Tensor,
    ) -> Tensor:
        ctx.call, ctx.collectives = call, collectives
        gathers = collectives is not None and collectives.gather_input_again(for_forward=True)
        ctx.fp8 = None if gathers else fp8_of(x)
        if ctx.fp8 is not None:
            ctx.fp8.keep(rows=True)
        ctx.gathers = gathers
        ctx.save_for_backward(*others, *(() if gathers else (x,)))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, collectives = ctx.call, ctx.collectives
        fp8, ctx.fp8 = ctx.fp8, None
        others = [other.detach().requires_grad_() for other in ctx.saved_tensors]
        x = collectives.wait_input_again() if ctx.gathers else others.pop()
        x = standing_for(x.detach().requires_grad_(), fp8 or fp8_of(x))
        take_part(x, collectives)
        with _fork_rng():
            _set_all_rng_states(*call.rng_states)
            with call.fp8.again(), torch.enable_grad():
                call.again = (x, *others), call.submodule(x, *others)
        return grads[0], *[None] * (len(ctx.needs_input_grad) - 1)
