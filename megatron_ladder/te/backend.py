"""Transformer Engine's modules for layers that own their collectives. Imported only where TE is."""

from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from torch import Tensor
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from megatron_ladder.collectives import collectives_of
from megatron_ladder.linear import column_gemm


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

    In bf16 the GEMM is ours, as in linear.py: TE's would keep the whole gathered input for backward, tp
    times the shard, and start no reduction before both gradients are there. In FP8 it is TE's, which
    keeps the gathered input in FP8.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _silence(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, input] -> [s, b, output/tp], its bias added, and None."""
        collectives = collectives_of(x)
        if collectives is None or FP8GlobalStateManager.is_fp8_enabled():
            return super().forward(x)
        fused = self.fuse_wgrad_accumulation
        bias = self.bias if self.use_bias else None
        return column_gemm(x, self.weight, bias, collectives, fused), None


class TECommFreeRowParallelLinear(TERowParallelLinear):
    """Row-parallel; the output is left partial."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _silence(self)


class TECommFreeBackend(TESpecProvider):
    """Separate norm and linears: TE's fused norm + linear communicates inside itself."""

    def column_parallel_linear(self) -> type:
        return TECommFreeColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return TECommFreeRowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return False
