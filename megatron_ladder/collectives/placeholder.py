"""What passes through autograd in place of an FP8 tensor, which autograd does not know.

An FP8 tensor is numbers, scales, perhaps a second layout of both: several tensors, in a class of
Transformer Engine's. Autograd sees a tensor of its shape that has no memory of its own, and the FP8
tensor travels as an attribute of that. The placeholder's numbers mean nothing: the linears read what it
stands for.
"""

from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

_FP8 = "_fp8"


class Fp8(Protocol):
    """An FP8 tensor [tokens, width] (te/quantised.py)."""

    def all_gather(
        self, group: dist.ProcessGroup, *, rows: bool, columns: bool
    ) -> tuple["Fp8", Any]:
        """Starts to bring the ranks' parts together.

        Args:
            rows: for GEMMs that sum over the width (the output, the input's gradient).
            columns: for the GEMM that sums over tokens (the weight's gradient).

        Returns:
            The whole, in flight, and what to wait for.
        """

    def keep(self, *, rows: bool) -> None:
        """Drops what nobody is going to read: all but the columns, or what they and `rows` are made of."""

    def used_here(self) -> None:
        """Tells CUDA's allocator that the current stream reads it."""


def placeholder(x: Tensor, *shape: int) -> Tensor:
    """A tensor of `x`'s dtype and device, and of `shape`, over one number."""
    return x.new_empty(()).expand(shape)


def fp8_of(x: Tensor) -> Fp8 | None:
    """What `x` is a placeholder of; None when it is a tensor like any other."""
    return getattr(x, _FP8, None)


def standing_for(x: Tensor, fp8: Fp8 | None) -> Tensor:
    """`x`, made the placeholder of `fp8` if that is one."""
    if fp8 is not None:
        setattr(x, _FP8, fp8)
    return x
