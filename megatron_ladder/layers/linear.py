"""Tensor-parallel linears that do not communicate: the ladder layer runs the collectives.

megatron-core's RowParallelLinear reduces its output and waits for that inside its own forward.
ColumnParallelLinear reduces its input's gradient inside its own backward. So neither reduction can overlap
with the next sub-module. The weights, their initialisation and their metadata for sharded checkpoints are
those of megatron-core's classes.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers
from torch import Tensor

from megatron_ladder.collectives.points import SubmoduleCollectives, collectives_of


class CommFreeColumnParallelLinear(ColumnParallelLinear):
    """Y = X A^T with A's rows split over tensor-parallel ranks. The input's gradient stays partial."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, disable_grad_reduce=True, **kwargs)
        self.sequence_parallel = False  # the layer has gathered the input
        assert not self.allreduce_dgrad and not self.gather_output

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, input] -> [s, b, output/tp] with the bias added, and None: no bias is left to add."""
        assert weight is None and (self.bias is None or not self.skip_bias_add)
        fused = self.gradient_accumulation_fusion
        return gemm(input_, self.weight, self.bias, collectives_of(input_), fused), None


class LocalRowParallelLinear(RowParallelLinear):
    """megatron-core's RowParallelLinear, with its process group passed on.

    megatron-core does not pass the group, and warns about that at each call. torch.compile cannot
    trace a warning.
    """

    def _forward_impl(self, *args: Any, **kwargs: Any) -> Tensor:
        return super()._forward_impl(*args, **{**kwargs, "tp_group": self.tp_group})


class CommFreeRowParallelLinear(RowParallelLinear):
    """Y = X A^T with A's columns split over tensor-parallel ranks. The output stays partial."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, input/tp] -> [s, b, output] partial sums, and the bias to add once after the sum."""
        return gemm(input_, self.weight, None, None, self.gradient_accumulation_fusion), self.bias


def gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    collectives: SubmoduleCollectives | None,
    fused: bool,
) -> Tensor:
    """Runs a linear of a sub-module on one rank.

    The first linear of a sub-module gets the sub-module's collectives. Its backward starts the sum of the
    input's gradient over the ranks before it computes the weight's gradient. With sequence parallelism it
    keeps only this rank's shard of the input for backward.

    Args:
        x: [s, b, input], gathered.
        weight: [output, input], this rank's part.
        bias: [output], or None.
        collectives: `collectives_of` `x`. None for other linears than the first one.
        fused: the weight's gradient is added to `weight.main_grad`, if it has one.

    Returns:
        [s, b, output], of `x`'s dtype.
    """
    output = _Gemm.apply(x, weight, collectives, fused)
    return output if bias is None else output + bias


class _Gemm(torch.autograd.Function):
    """x [s, b, i] times weight^T [i, o]. megatron-core's own function takes twice as long in Python."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        collectives: SubmoduleCollectives | None,
        fused: bool,
    ) -> Tensor:
        ctx.collectives, ctx.fused = collectives, fused
        ctx.gathers = collectives is not None and collectives.gather_input_again()
        ctx.save_for_backward(weight, *(() if ctx.gathers else (x,)))
        return torch.matmul(x, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, collectives = ctx.saved_tensors[0], ctx.collectives
        dgrad: Tensor | None = grads[0].matmul(weight)
        if collectives is not None:
            collectives.start_input_gradient(dgrad)
            dgrad = None
        if not ctx.needs_input_grad[1]:
            return dgrad, None, None, None
        x = collectives.wait_input_again() if ctx.gathers else ctx.saved_tensors[1]
        grad, x = grads[0].flatten(0, 1), x.flatten(0, 1)
        if ctx.fused and hasattr(weight, "main_grad"):
            return dgrad, _add_to_main_grad(weight, grad, x), None, None
        return dgrad, grad.t().matmul(x), None, None


def _add_to_main_grad(weight: Any, grad: Tensor, x: Tensor) -> Tensor:
    """Adds grad^T x to DDP's gradient buffer, on a GPU in the GEMM itself.

    Returns an uninitialised tensor of the weight's shape for autograd, which does not use its numbers.
    """
    if not x.is_cuda:
        weight.main_grad.add_(grad.t().matmul(x))
    elif hasattr(layers, "fused_weight_gradient_mlp_cuda"):
        assert weight.main_grad.dtype == torch.float32
        apex: Any = layers.fused_weight_gradient_mlp_cuda
        apex.wgrad_gemm_accum_fp32(x, grad, weight.main_grad)
    else:
        from megatron_ladder.te.gemm import add_product

        add_product(grad, x, weight.main_grad)
    weight.grad_added_to_main_grad = True  # so DDP adds nothing
    return torch.empty_like(weight)


def first_linear(mlp: Any) -> Any:
    """The first linear that runs in an MLP, or in the experts of a mixture."""
    experts = getattr(mlp, "experts", mlp)
    first = experts.local_experts[0] if hasattr(experts, "local_experts") else experts
    return first.linear_fc1
