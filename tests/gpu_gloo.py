"""gloo as it is with a GPU's tensors, on a CPU: results are copied back from the host.

torch's ProcessGroupGloo (AsyncAllreduceCUDAHostWork, AsyncAllgatherCUDAWork) works on copies in the host's
memory. When the work ends, a thread of gloo's copies the result into the caller's tensor by `copy_`, in the
grad mode in which the work was started. Until then the tensor holds what it held; then its version rises,
and that of all that share it. gloo's sum of a CPU's tensor writes its memory and leaves the version alone.
Reduce-scatters are the same for both: they copy their result within `wait`.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ladder.collectives.names import ALL_GATHER

Ends = Literal["at once", "when waited for"]
"""When gloo's thread gets there: the two ends of what can happen."""


def install(ends: Ends) -> None:
    """For the whole process: call it in a rank of its own."""
    reduce, gather = dist.all_reduce, dist.all_gather_into_tensor

    def all_reduce(
        x: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        host = x.detach().clone()
        work = _Copying(reduce(host, op, group, async_op=True), [x], [host])
        return work.begun(async_op, ends)

    def all_gather(out: Tensor, x: Tensor, group: Any = None, async_op: bool = False) -> Any:
        host, ranks = torch.empty_like(out), dist.get_world_size(group)
        own = x.detach().clone()
        work = _Copying(
            gather(host, own, group, async_op=True), list(out.chunk(ranks)), list(host.chunk(ranks))
        )
        return work.begun(async_op, ends)

    dist.all_reduce = all_reduce
    for name in ("all_gather_into_tensor", ALL_GATHER):
        setattr(dist, name, all_gather)


class _Copying:
    def __init__(self, work: Any, to: list[Tensor], of: list[Tensor]) -> None:
        self._work, self._to, self._of = work, to, of
        self._records = torch.is_grad_enabled()

    def begun(self, async_op: bool, ends: Ends) -> Any:
        if not async_op or ends == "at once":
            self.wait()
        return self if async_op else None

    def wait(self) -> None:
        self._work.wait()
        with torch.set_grad_enabled(self._records):
            for to, of in zip(self._to, self._of, strict=True):
                to.copy_(of)
        self._to, self._of = [], []
