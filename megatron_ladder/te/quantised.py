"""FP8 tensors between a sub-module and its neighbours: what is gathered under sequence parallelism.

Forward, the input of a sub-module's first linear: the norm writes it in FP8. Backward, the gradient of its
last linear's output. Transformer Engine's layers do both, with communication of their own.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from transformer_engine.pytorch.distributed import gather_along_first_dim

from megatron_ladder.collectives import used_here
from megatron_ladder.placeholder import placeholder, standing_for


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
        if self.quantizer.supports_only_rowwise_all_gather():
            rows, columns = True, False  # the GEMM makes the other layout of it
        self.quantizer.set_usage(rowwise=rows, columnwise=columns)
        self.quantizer.optimize_for_gemm = False
        whole, work = gather_along_first_dim(
            self.tensor, group, async_op=True, quantizer=self.quantizer
        )
        return Quantised(whole, self.quantizer, work), work or _Done()

    def keep(self, *, rows: bool) -> None:
        if self.quantizer.supports_only_rowwise_all_gather():
            self.tensor.update_usage(rowwise_usage=True, columnwise_usage=False)
        else:
            self.tensor.update_usage(rowwise_usage=rows, columnwise_usage=True)

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


def prepare_to_gather(quantizer: Any, *, columns: bool) -> None:
    """Sets what a part is to have that ranks gather: all that is read of the whole."""
    columns = columns and not quantizer.supports_only_rowwise_all_gather()
    quantizer.set_usage(rowwise=True, columnwise=columns)
    quantizer.optimize_for_gemm = False  # scales in the order of tokens, to be put together


def quantised(x: Tensor, quantizer: Any) -> Tensor:
    """A placeholder of `x` [s, b, width] in FP8."""
    fp8 = Quantised(quantizer(x.reshape(-1, x.size(-1)).contiguous()), quantizer)
    return standing_for(placeholder(x, *x.shape), fp8)
