"""A collective in flight, and the memory of the tensors that it reads and writes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ladder.collectives.placeholder import fp8_of
from megatron_ladder.collectives.quantised_sum import Work


@dataclass(slots=True)
class Flight:
    """A collective in flight: the tensor that it writes, the tensor that it reads, and its handle."""

    result: Tensor
    source: Tensor
    work: Work

    def arrive(self) -> Tensor:
        self.work.wait()
        # After the wait this object drops `source`, which NCCL has read. The allocator could then reuse its
        # memory at once on the stream that made it. That may be another stream, which has not waited.
        used_here(self.source)
        return used_here(self.result)


def uncounted(x: Tensor) -> Tensor:
    """`x` over the same memory, for a collective that writes to it without autograd's version counter.

    Autograd counts the writes to a tensor. After a write it refuses tensors that it saved before, and views
    that were taken before. The writes of some backends count and those of others do not. Their time differs
    too: gloo's thread copies a sum back to a GPU tensor at any time before the wait. No code reads a result
    before the wait, so this check is not needed here. `.data` has a version counter of its own.
    `.detach()` and views share `x`'s counter, under no_grad too.
    """
    return x.data


def used_here(x: Tensor) -> Tensor:
    """Tells CUDA's allocator that the current stream reads `x`, which another stream may have made.

    Returns `x`.
    """
    if (fp8 := fp8_of(x)) is not None:
        fp8.used_here()
    elif x.is_cuda:
        x.record_stream(torch.cuda.current_stream())
    return x
