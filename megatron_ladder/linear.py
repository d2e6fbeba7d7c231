"""Tensor-parallel linears that do not communicate: the ladder layer owns its collectives.

megatron-core's RowParallelLinear reduces inside its own forward and waits there, and
ColumnParallelLinear reduces its input gradient inside its own backward; neither can hide behind the
next sub-module. Weights, their initialisation and their sharded-checkpoint metadata stay those of
the parents.
"""

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor


class CommFreeColumnParallelLinear(ColumnParallelLinear):
    """Y = X A^T with A's rows split over tensor-parallel ranks; the input gradient is left partial."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, disable_grad_reduce=True, **kwargs)
        self.sequence_parallel = False  # its input comes gathered
        assert not self.allreduce_dgrad and not self.gather_output


class CommFreeRowParallelLinear(RowParallelLinear):
    """Y = X A^T with A's columns split over tensor-parallel ranks; the output is left partial."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, input/tp] -> [s, b, output] partial sums, and the bias to add once after the sum."""
        output = self._forward_impl(
            input=input_,
            weight=self.weight,
            bias=None,
            gradient_accumulation_fusion=self.gradient_accumulation_fusion,
            allreduce_dgrad=False,
            sequence_parallel=False,
            tp_group=None,
            grad_output_buffer=None,
        )
        return output, self.bias
