"""An all-reduce in two operators: one starts it, the other waits for it and adds the sum.

torch sees them as two opaque functions, so that Dynamo, Inductor and CUDA graphs keep both, in order,
and what runs between them runs beside the sum. On a GPU it is vLLM's own all-reduce (its one-shot
kernel, symmetric memory or NCCL, as vLLM chooses by size), on a side stream that is forked and joined
by events, which a CUDA graph captures as edges. Elsewhere it is torch's functional collective, which
runs in the backend's thread.

Who holds what memory, as another stream reads it meanwhile:

- The partial output must not be freed or reused before the sum has arrived. `record_stream` would tell
  CUDA's allocator, but not Inductor, which reuses buffers by itself. So the partial output is also
  an argument of the second operator, which writes the result there: nobody sees it as free.
- That also gives the result an address that a captured graph made. vLLM captures a forward in pieces,
  between operators that run outside of them; a piece reads its inputs at fixed addresses, so such an
  operator must write to a buffer of a captured piece, as vLLM's attention does.
- The sum is made on the side stream and freed after the second operator. The side stream reuses its
  memory only after it has waited for the main stream, which has read it by then.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_ladder.vllm.schedule import InFlight

START, FINISH = "megatron_ladder::all_reduce_start", "megatron_ladder::all_reduce_finish"

_library = torch.library.Library("megatron_ladder", "DEF")  # operators live as long as it does
_library.define("all_reduce_start(Tensor partial, str group) -> Tensor")
_library.define("all_reduce_finish(Tensor residual, Tensor total, Tensor(a!) partial) -> ()")


class AllReduce:
    """The sums of schedule.py over a tensor-parallel group.

    Args:
        group: torch's name of it; None for a single rank, which has nothing to sum.
        at_once: vLLM's own all-reduce, for sums that nothing runs beside: vLLM fuses it with what follows.
    """

    def __init__(self, group: str | None, at_once: Callable[[Tensor], Tensor]) -> None:
        self.group, self.at_once = group, at_once

    def start(self, partial: Tensor) -> InFlight:
        if self.group is None:
            return InFlight(partial, partial)
        total = torch.ops.megatron_ladder.all_reduce_start(partial, self.group)
        return InFlight(partial, total)

    def finish(self, residual: Tensor, output: InFlight) -> Tensor:
        if self.group is None:
            return residual + output.total
        torch.ops.megatron_ladder.all_reduce_finish(residual, output.total, output.partial)
        return output.partial


def run_between_graphs(splitting_ops: list[str] | None) -> None:
    """Adds both operators to those at which vLLM ends one captured graph and begins the next.

    It ends them at each attention, across which an MLP's sum is under way, and no graph may end before a
    stream that it forked. Without such operators (None or empty) it captures a whole forward or nothing.
    """
    if splitting_ops:
        splitting_ops.extend(name for name in (START, FINISH) if name not in splitting_ops)


def _start(partial: Tensor, group: str) -> Tensor:
    return torch.ops._c10d_functional.all_reduce(partial, "sum", group)


def _finish(residual: Tensor, total: Tensor, partial: Tensor) -> None:
    torch.add(residual, torch.ops._c10d_functional.wait_tensor(total), out=partial)


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """One, so that sums run one after another: vLLM's kernels share buffers between calls.

    Its few blocks go before those of the GEMM beside it, which else would take every SM first.
    """
    return torch.cuda.Stream(priority=-1)


# By the sum's address, as torch keeps the work of its functional collectives: an operator takes tensors.
_arrivals: dict[int, torch.cuda.Event | None] = {}


def _start_cuda(partial: Tensor, group: str) -> Tensor:
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture
    from vllm.distributed import get_tp_group

    all_reduce = get_tp_group()._all_reduce_out_place
    if BreakableCUDAGraphCapture.is_active():
        # It ends a graph at each attention, where another stream may not be under way.
        total = all_reduce(partial)
        _arrivals[total.data_ptr()] = None
        return total
    side = _side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        total = all_reduce(partial)
        # Not the stream but this moment of it: the next sum may be queued there by the time of the wait.
        _arrivals[total.data_ptr()] = side.record_event()
    return total


def _finish_cuda(residual: Tensor, total: Tensor, partial: Tensor) -> None:
    arrival = _arrivals.pop(total.data_ptr())
    if arrival is not None:
        torch.cuda.current_stream().wait_event(arrival)
    torch.add(residual, total, out=partial)


_library.impl("all_reduce_start", _start, "CompositeExplicitAutograd")
_library.impl("all_reduce_finish", _finish, "CompositeExplicitAutograd")
_library.impl("all_reduce_start", _start_cuda, "CUDA")
_library.impl("all_reduce_finish", _finish_cuda, "CUDA")
torch.library.register_fake(START, lambda partial, group: torch.empty_like(partial), lib=_library)
torch.library.register_fake(FINISH, lambda residual, total, partial: None, lib=_library)
