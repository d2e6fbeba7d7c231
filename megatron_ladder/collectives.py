"""The tensor-parallel collectives of a ladder layer, split into a start and a wait.

A sub-module's linears communicate nothing (linear.py); the layer does it at four points:

    x -> norm -> [gradient wait] -> [gradient start] -> sub-module -> [start] ... [wait] -> add

Forward, `start_all_reduce` launches the sum of the sub-module's output over the tensor-parallel
ranks and `wait` is called as late as the residual stream allows, after the next sub-module has been
queued. In between the tensor holds partial sums: it may be passed on, never read.

Backward, `reduce_gradient` sums the sub-module's input gradient: started when that gradient exists,
waited for before the norm's backward reads it. Autograd's own order runs the wait right after the
start, so backward is correct but not overlapped yet.
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


class _Work(Protocol):
    def wait(self) -> object: ...


# The handle of a collective in flight travels on the tensor it writes to. megatron-core passes
# layers' outputs on untouched, so the next layer finds it there.
_IN_FLIGHT = "_tensor_parallel_work"


class _StartAllReduce(torch.autograd.Function):
    """Forward: starts the sum of `x` over `group`, in place. Backward: identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, started: list[_Work]) -> Tensor:
        # In place: `x` is a GEMM's fresh output, which no backward formula reads.
        ctx.mark_dirty(x)
        started.append(dist.all_reduce(x, group=group, async_op=True))
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def start_all_reduce(x: Tensor, group: Group) -> Tensor:
    """Starts the sum of `x` over the tensor-parallel ranks; read the result only after `wait`.

    Args:
        x: a sub-module's partial output, [s, b, h]; overwritten.
        group: the tensor-parallel group.
    """
    if group.size() == 1:
        return x
    started: list[_Work] = []
    x = _StartAllReduce.apply(x, group, started)
    setattr(x, _IN_FLIGHT, started[0])
    return x


def wait(x: Tensor) -> Tensor:
    """Waits for the collective that writes to `x`, if one is in flight, and returns `x`."""
    work = getattr(x, _IN_FLIGHT, None)
    if work is not None:
        work.wait()
        delattr(x, _IN_FLIGHT)
    return x


class _StartGradientReduce(torch.autograd.Function):
    """Forward: identity. Backward: starts the sum of the gradient over `group`, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, started: list[_Work]) -> Tensor:
        ctx.group, ctx.started = group, started
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].contiguous()
        ctx.started.append(dist.all_reduce(grad, group=ctx.group, async_op=True))
        return grad, None, None


class _WaitGradientReduce(torch.autograd.Function):
    """Forward: identity. Backward: waits for the sum that `_StartGradientReduce` started."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, started: list[_Work]) -> Tensor:
        ctx.started = started
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.started.pop().wait()
        return grads[0], None


def reduce_gradient(x: Tensor, group: Group) -> Tensor:
    """Identity on a sub-module's input [s, b, h]; backward sums its gradient over `group`.

    Each rank's column-parallel linear sees only its own output columns, so each holds a part of
    the input's gradient.
    """
    if group.size() == 1:
        return x
    started: list[_Work] = []
    return _StartGradientReduce.apply(_WaitGradientReduce.apply(x, started), group, started)
