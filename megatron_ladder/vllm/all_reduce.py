"""An all-reduce in two operators: one starts it, the other waits for it and adds the sum.

torch treats them as two opaque functions. So Dynamo, Inductor and CUDA graphs keep both, in their order,
and the work between them overlaps with the sum. On a GPU the all-reduce is vLLM's own (its one-shot
kernel, symmetric memory or NCCL: vLLM chooses by size). It runs on a side stream that is forked and
joined by events, which a CUDA graph captures as edges. Elsewhere the all-reduce is torch's functional
collective, which runs in the backend's thread.

Another stream reads memory while the sum is in flight. This is how the memory stays valid:

- The partial output must not be freed or reused before the sum has arrived. `record_stream` would tell this
  to CUDA's allocator, but not to Inductor, which reuses buffers by itself. Therefore the partial output is
  also an argument of the second operator, which writes the result there. Then both see it as in use.
- The result then also has an address inside a captured graph. vLLM captures a forward in pieces, between
  operators that run outside the pieces. A piece reads its inputs at fixed addresses. So an operator between
  pieces must write to a buffer of a captured piece, as vLLM's attention does.
- The sum is allocated on the side stream and freed after the second operator. The side stream reuses its
  memory only after it has waited for the main stream, which has then read the sum.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_ladder.vllm.schedule import InFlight

START, FINISH = "megatron_ladder::all_reduce_start", "megatron_ladder::all_reduce_finish"

_library = torch.library.Library("megatron_ladder", "DEF")  # operators exist as long as this object
_library.define("all_reduce_start(Tensor partial, str group) -> Tensor")
_library.define("all_reduce_finish(Tensor residual, Tensor total, Tensor(a!) partial) -> ()")


class AllReduce:
    """The sums of schedule.py over a tensor-parallel group.

    Args:
        group: torch's name of the group. None: a single rank, which has nothing to sum.
        at_once: vLLM's own all-reduce, for sums that do not overlap with other work. vLLM fuses it with
            the operations after it.
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
    """Adds both operators to those at which vLLM ends one captured graph and starts the next.

    vLLM ends a graph at each attention, while the sum of an MLP is in flight on the side stream. But a
    graph must not end before a stream that it forked has been joined.

    Args:
        splitting_ops: vLLM's list. When it is None or empty, vLLM captures a whole forward or nothing, and
            nothing is added.
    """
    if splitting_ops:
        splitting_ops.extend(name for name in (START, FINISH) if name not in splitting_ops)


def _start(partial: Tensor, group: str) -> Tensor:
    return torch.ops._c10d_functional.all_reduce(partial, "sum", group)


def _finish(residual: Tensor, total: Tensor, partial: Tensor) -> None:
    torch.add(residual, torch.ops._c10d_functional.wait_tensor(total), out=partial)


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """A single side stream, so that sums run one after another: vLLM's kernels share buffers between calls.

    It has high priority: the few thread blocks of a sum start before those of the GEMM that runs at the
    same time. Otherwise the GEMM would occupy every SM first.
    """
    return torch.cuda.Stream(priority=-1)


# The event at which each sum has arrived, by the address of the sum. An operator takes only tensors, so it
# cannot pass an event on. torch keeps the work of its functional collectives in the same way.
_arrivals: dict[int, torch.cuda.Event | None] = {}


def _start_cuda(partial: Tensor, group: str) -> Tensor:
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture
    from vllm.distributed import get_tp_group

    all_reduce = get_tp_group()._all_reduce_out_place
    if BreakableCUDAGraphCapture.is_active():
        # This kind of capture ends a graph at each attention. No work may be in flight on another stream
        # there, so the sum runs on this stream.
        total = all_reduce(partial)
        _arrivals[total.data_ptr()] = None
        return total
    side = _side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        total = all_reduce(partial)
        # An event, because at the time of the wait the next sum may be queued on the stream already.
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
