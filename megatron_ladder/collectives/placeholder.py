"""Placeholders: ordinary tensors that pass through autograd in place of FP8 tensors.

Autograd does not support FP8 tensors. An FP8 tensor is several tensors in one class of Transformer
Engine: the numbers, their scales, and perhaps a second layout of both. So autograd gets a placeholder, a
tensor of the same shape that has no memory of its own. The FP8 tensor is an attribute of the placeholder.
The placeholder's numbers mean nothing. The linears read the FP8 tensor.
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
        """Starts an all-gather of the ranks' parts.

        Args:
            rows: gather the row layout, for GEMMs that sum over the width (the output, the input's
                gradient).
            columns: gather the column layout, for the GEMM that sums over tokens (the weight's gradient).

        Returns:
            The gathered tensor, in flight, and a handle whose `wait()` completes it.
        """

    def keep(self, *, rows: bool) -> None:
        """Drops the layouts that nothing will read.

        The columns are kept, or the rows from which they can be made; with `rows`, the rows too.
        """

    def used_here(self) -> None:
        """Tells CUDA's allocator that the current stream reads this tensor."""


def placeholder(x: Tensor, *shape: int) -> Tensor:
    """A tensor of `shape`, with `x`'s dtype and device. Its memory is a single number."""
    return x.new_empty(()).expand(shape)


def fp8_of(x: Tensor) -> Fp8 | None:
    """The FP8 tensor that `x` is a placeholder of. None when `x` is an ordinary tensor."""
    return getattr(x, _FP8, None)


def standing_for(x: Tensor, fp8: Fp8 | None) -> Tensor:
    """Makes `x` the placeholder of `fp8`, unless `fp8` is None, and returns `x`."""
    if fp8 is not None:
        setattr(x, _FP8, fp8)
    return x
