"""Transformer Engine's modules for layers that own their collectives. Imported only where TE is."""

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
    """Turns a TE linear's tensor-parallel communication off.

    Weight shape, initialisation and checkpoint metadata stay those of the parallel linear; TE reads
    these three in its forward. megatron-core does the same for mixture-of-experts linears.
    """
    linear.parallel_mode = None
    linear.tp_size = 1
    linear.sequence_parallel = False


class TECommFreeColumnParallelLinear(TEColumnParallelLinear):
    """Column-parallel; the input gradient is left partial.

    The GEMM's autograd is ours, in bf16 (linear.py) and in FP8 (fp8_linear.py): TE's would keep the whole
    gathered input for backward, tp times the shard, and start no reduction before both gradients are
    there. In bf16 it takes several times as much Python, too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _silence(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, input] -> [s, b, output/tp], its bias added, and None."""
        if FP8GlobalStateManager.is_fp8_enabled():
            return fp8_linear(self, x), None
        bias = self.bias if self.use_bias else None
        return gemm(x, self.weight, bias, collectives_of(x), self.fuse_wgrad_accumulation), None

    def normalised(self, x: Tensor, norm: Any, gathered_by: Any) -> Tensor:
        """norm(x), for this linear: in FP8 within an autocast to FP8.

        Args:
            x: [s, b, h], or [s/tp, b, h] with sequence parallelism.
            gathered_by: the ranks that will gather it; None for none.
        """
        if not FP8GlobalStateManager.is_fp8_enabled():
            return norm(x)  # of an FP8 layer, but started in the layer before, which is in bf16
        return normalised(self, x, norm, gathered_by)


class TECommFreeRowParallelLinear(TERowParallelLinear):
    """Row-parallel; the output is left partial."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _silence(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, input/tp] -> [s, b, output] partial sums, and None."""
        if FP8GlobalStateManager.is_fp8_enabled():
            return fp8_linear(self, x), None
        return gemm(x, self.weight, None, None, self.fuse_wgrad_accumulation), None

    def output_gradient(self, grad: Tensor, gathered_by: Any) -> Tensor:
        """A rank's part [s/tp, b, output] of the output's gradient, in FP8: a placeholder of it."""
        return output_gradient(self, grad, gathered_by)


class TECommFreeBackend(TESpecProvider):
    """Separate norm and linears: TE's fused norm + linear communicates inside itself."""

    def layer_norm(self, *_: Any, **__: Any) -> type:
        return RMSNorm

    def column_parallel_linear(self) -> type:
        return TECommFreeColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return TECommFreeRowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return False
