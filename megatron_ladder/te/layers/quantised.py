"""The FP8 tensors that the ranks gather under sequence parallelism.

In forward this is the input of a sub-module's first linear: the norm writes it in FP8. In backward it is
the gradient of the output of its last linear. Transformer Engine's own layers gather both in FP8 too,
with their own communication.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from transformer_engine.pytorch import Float8CurrentScalingQuantizer, Float8Quantizer
from transformer_engine.pytorch.distributed import gather_along_first_dim

from megatron_ladder.collectives.flight import used_here
from megatron_ladder.collectives.placeholder import placeholder, standing_for


class Quantised:
    """An FP8 tensor [tokens, width], of one rank or gathered. It implements placeholder.Fp8.

    Args:
        tensor: Transformer Engine's tensor, with the layouts that its GEMMs read.
        quantizer: the quantizer that made it.
        work: the handle of the all-gather, or None.
    """

    def __init__(self, tensor: Any, quantizer: Any, work: Any = None) -> None:
        self.tensor, self.quantizer, self._work = tensor, quantizer, work

    def all_gather(
        self, group: dist.ProcessGroup, *, rows: bool, columns: bool
    ) -> tuple["Quantised", Any]:
        set_usage(self.quantizer, rows=rows, columns=columns, gathered=True)
        whole, work = gather_along_first_dim(
            self.tensor, group, async_op=True, quantizer=self.quantizer
        )
        return Quantised(whole, self.quantizer, work), work or _Done()

    def keep(self, *, rows: bool) -> None:
        # With one scale per tensor, a GEMM makes the columns from the rows when it needs them.
        one_scale = has_one_scale(self.quantizer)
        self.tensor.update_usage(rowwise_usage=rows or one_scale, columnwise_usage=not one_scale)

    def used_here(self) -> None:
        # With one scale per block, the wait reorders the scales. They were received in buffers that were
        # made on the stream of the all-gather.
        buffers = getattr(self._work, "post_process_function_args", None) or ()
        for part in (*vars(self.tensor).values(), *buffers):
            if isinstance(part, Tensor):
                used_here(part)
        self._work = None


class _Done:
    """A handle with nothing to wait for.

    When blocks of 128 tokens are split over ranks, Transformer Engine gathers in bf16, and the gather is
    complete at once.
    """

    def wait(self) -> None:
        pass


def has_one_scale(quantizer: Any) -> bool:
    """Whether a tensor gets one scale (delayed, tensorwise). Then its columns are its rows, transposed."""
    return isinstance(quantizer, Float8Quantizer | Float8CurrentScalingQuantizer)


def set_usage(
    quantizer: Any, *, rows: bool = True, columns: bool = True, gathered: bool = False
) -> None:
    """Sets the layouts that `quantizer` writes: those that will be read, or from which they can be made.

    With one scale per tensor the kernel cannot write columns without rows. Then ranks gather the rows
    alone, and the gathered tensor makes its columns from them. With one scale per block no layout can be
    made from the other.

    Args:
        quantizer: Transformer Engine's.
        rows: GEMMs that sum over the width will read the rows.
        columns: the GEMM that sums over tokens will read the columns.
        gathered: the tensor is one rank's part that will be gathered, or the gathered tensor.
    """
    if has_one_scale(quantizer):
        rows, columns = True, columns and not gathered
    quantizer.set_usage(rowwise=rows, columnwise=columns)
    quantizer.optimize_for_gemm = not gathered  # gathered scales are joined in token order


def quantised(x: Tensor, quantizer: Any) -> Tensor:
    """Quantises `x` [s, b, width] to FP8. Returns a placeholder of the FP8 tensor, of `x`'s shape."""
    fp8 = Quantised(quantizer(x.reshape(-1, x.size(-1)).contiguous()), quantizer)
    return standing_for(placeholder(x, *x.shape), fp8)
