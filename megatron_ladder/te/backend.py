"""Transformer Engine's modules for layers that own their collectives. Imported only where TE is."""

from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider


def _silence(linear: Any) -> None:
    """Turns a TE linear's tensor-parallel communication off.

    Weight shape, initialisation and checkpoint metadata stay those of the parallel linear; TE reads
    these three in its forward. megatron-core does the same for mixture-of-experts linears.
    """
    linear.parallel_mode = None
    linear.tp_size = 1
    linear.sequence_parallel = False


class TECommFreeColumnParallelLinear(TEColumnParallelLinear):
    """Column-parallel; the input gradient is left partial."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _silence(self)


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
