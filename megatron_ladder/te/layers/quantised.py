"""FP8 tensors between a sub-module and its neighbours: what is gathered under sequence parallelism.

Forward, the input of a sub-module's first linear: the norm writes it in FP8. Backward, the gradient of its
last linear's output. Transformer Engine's layers do both, with communication of their own.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from transformer_engine.pytorch import Float8CurrentScalingQuantizer, Float8Quantizer
from transformer_engine.pytorch.distributed import gather_along_first_dim

from megatron_ladder.collectives.placeholder import placeholder, standing_for
from megatron_ladder.collectives.points import used_here


class Quantised:
    """[tokens, width] in FP8, of one rank or gathered; a placeholder.Fp8.

    Args:
        tensor: Transformer Engine's, with the layouts that its GEMMs read.
        quantizer: what made it.
        work: what brings it together.
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
        # Of rows with one scale columns are made when a GEMM asks for them.
        one_scale = has_one_scale(self.quantizer)
        self.tensor.update_usage(rowwise_usage=rows or one_scale, columnwise_usage=not one_scale)

    def used_here(self) -> None:
        # Waiting puts blocks' scales in order, which came in buffers of the gathering's stream.
        buffers = getattr(self._work, "post_process_function_args", None) or ()
        for part in (*vars(self.tensor).values(), *buffers):
            if isinstance(part, Tensor):
                used_here(part)
        self._work = None


class _Done:
    """Where blocks of 128 tokens are cut by ranks, what is gathered is bf16, and at once."""

    def wait(self) -> None:
        pass


def has_one_scale(quantizer: Any) -> bool:
    """Whether a tensor gets one scale (delayed, tensorwise). Its columns are then its rows, transposed."""
    return isinstance(quantizer, Float8Quantizer | Float8CurrentScalingQuantizer)


def set_usage(
    quantizer: Any, *, rows: bool = True, columns: bool = True, gathered: bool = False
) -> None:
    """Sets what `quantizer` writes, so that what is going to be read is there or can be made of it.

    With one scale a tensor the kernel writes no columns without rows, and ranks gather rows alone, of which
    the GEMM's operand makes its columns. With scales of blocks neither can be made of the other.

    Args:
        rows: are read, by GEMMs that sum over the width.
        columns: are read, by the GEMM that sums over tokens.
        gathered: it is a part that ranks are going to gather, or what they gather.
    """
    if has_one_scale(quantizer):
        rows, columns = True, columns and not gathered
    quantizer.set_usage(rowwise=rows, columnwise=columns)
    quantizer.optimize_for_gemm = not gathered  # gathered scales are put together in tokens' order


def quantised(x: Tensor, quantizer: Any) -> Tensor:
    """A placeholder of `x` [s, b, width] in FP8."""
    fp8 = Quantised(quantizer(x.reshape(-1, x.size(-1)).contiguous()), quantizer)
    return standing_for(placeholder(x, *x.shape), fp8)
