"""Transformer Engine's (TE's) modules without communication: the layers run the collectives.

Imported only where TE is installed.
"""

from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from torch import Tensor
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from megatron_ladder.collectives.points import collectives_of
from megatron_ladder.layers.linear import gemm
from megatron_ladder.te.layers.fp8_linear import fp8_linear, normalised, output_gradient
from megatron_ladder.te.layers.norm import RMSNorm


def _silence(linear: Any) -> None:
    """Turns off the tensor-parallel communication of a TE linear.

    TE reads these three attributes in its forward. The weight's shape, its initialisation and its
    checkpoint metadata stay those of the parallel linear. megatron-core does the same for linears in
    mixtures of experts.
    """
    linear.parallel_mode = None
    linear.tp_size = 1
    linear.sequence_parallel = False


class TECommFreeColumnParallelLinear(TEColumnParallelLinear):
    """A column-parallel linear. The input's gradient stays partial.

    The autograd function is this project's, in bf16 (linear.py) and in FP8 (fp8_linear.py). TE's would keep
    the whole gathered input for backward, tp times the size of the shard. It would also start the reduction
    only after the gradients of both input and weight are computed. In bf16 TE's takes several times as much
    time in Python, too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _silence(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, input] -> [s, b, output/tp] with the bias added, and None: no bias is left to add."""
        if FP8GlobalStateManager.is_fp8_enabled():
            return fp8_linear(self, x), None
        bias = self.bias if self.use_bias else None
        return gemm(x, self.weight, bias, collectives_of(x), self.fuse_wgrad_accumulation), None

    def normalised(self, x: Tensor, norm: Any, gathered_by: Any) -> Tensor:
        """norm(x) as the input of this linear. It is in FP8 inside an autocast to FP8.

        Args:
            x: [s, b, h], or [s/tp, b, h] with sequence parallelism.
            norm: a module with RMSNorm's weight.
            gathered_by: the process group that will gather it. None: it is not gathered.

        Returns:
            A tensor of `x`'s shape; in FP8, a placeholder.
        """
        if not FP8GlobalStateManager.is_fp8_enabled():
            return norm(x)  # the previous layer, which is in bf16, starts this FP8 layer's input
        return normalised(self, x, norm, gathered_by)


class TECommFreeRowParallelLinear(TERowParallelLinear):
    """A row-parallel linear. The output stays partial."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _silence(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, input/tp] -> [s, b, output] partial sums, and None: there is no bias."""
        if FP8GlobalStateManager.is_fp8_enabled():
            return fp8_linear(self, x), None
        return gemm(x, self.weight, None, None, self.fuse_wgrad_accumulation), None

    def output_gradient(self, grad: Tensor, gathered_by: Any) -> Tensor:
        """Quantises a rank's part [s/tp, b, output] of the output's gradient; returns a placeholder."""
        return output_gradient(self, grad, gathered_by)


class TECommFreeBackend(TESpecProvider):
    """Norm and linears as separate modules, because TE's fused norm + linear communicates inside itself."""

    def layer_norm(self, *_: Any, **__: Any) -> type:
        return RMSNorm

    def column_parallel_linear(self) -> type:
        return TECommFreeColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return TECommFreeRowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return False
