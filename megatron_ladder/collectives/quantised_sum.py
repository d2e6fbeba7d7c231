"""An all-reduce in int8, for inference: it sends half as many bytes as bf16, with a small rounding error.

The method is that of ZeRO++ (arXiv 2306.10209) and Flash Communication (arXiv 2412.04964). Each rank cuts
its partial sums into one part for every rank, and quantises the parts to int8, with one scale for each
group of numbers. The ranks exchange the parts (all-to-all). Each rank adds its part in fp32, quantises the
sum to int8, and the ranks gather the sums (all-gather). A number is rounded once on each rank and once as
a sum. Each rounding error is at most half a scale.
"""

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ladder.collectives import streams
from megatron_ladder.collectives.names import ALL_GATHER

GROUP = 128
"""How many numbers share one scale. A scale is fp32, 4 bytes: the group's largest magnitude / 127."""
_SCALE_BYTES = 4


class Work(Protocol):
    """A sum in flight."""

    def wait(self) -> object: ...


def start(x: Tensor, group: dist.ProcessGroup) -> Work:
    """Starts to sum `x` over the ranks of `group`, in place, while the caller computes something else.

    The sum runs on the second stream on a GPU, and in a thread on a CPU. Call no other collective of the
    group before `wait` returns: the thread does not keep the order of collectives.

    Args:
        x: any shape, fp32 or bf16. Read it only after `wait`.

    Returns:
        The sum in flight.
    """
    if x.is_cuda:
        with streams.beside(streams.moment(), x):
            sum_in_place(x, group)
            return _OnStream(streams.moment())
    return _InThread(_thread().submit(sum_in_place, x, group))


@torch.inference_mode()
def sum_in_place(x: Tensor, group: dist.ProcessGroup) -> None:
    """Sums `x` over the ranks, in place. All ranks get bitwise the same numbers.

    Args:
        x: any shape, fp32 or bf16.
    """
    ranks, count = group.size(), x.numel()
    each = -(-count // (ranks * GROUP)) * GROUP
    parts = torch.nn.functional.pad(x.reshape(-1), (0, ranks * each - count)).view(ranks, each)
    sent = to_int8(parts)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    mine = to_int8(from_int8(received).sum(0))
    gathered = torch.empty_like(sent)
    getattr(dist, ALL_GATHER)(gathered.view(-1), mine, group=group)
    x.copy_(from_int8(gathered).view(-1)[:count].view_as(x))


def to_int8(x: Tensor) -> Tensor:
    """Quantises `x` to int8 and packs the numbers, then the groups' fp32 scales, as bytes.

    `from_int8` gives NaN for every number of a group that contains NaN or infinity.

    Args:
        x: [..., n], n a multiple of GROUP.

    Returns:
        uint8 [..., n + n/32].
    """
    groups = x.float().unflatten(-1, (-1, GROUP))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    numbers = (groups / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    return torch.cat(
        [numbers.flatten(-2).view(torch.uint8), scales.squeeze(-1).view(torch.uint8)], dim=-1
    )


def from_int8(packed: Tensor) -> Tensor:
    """Unpacks the uint8 [..., n + n/32] of `to_int8` to fp32 [..., n]."""
    count = packed.size(-1) * GROUP // (GROUP + _SCALE_BYTES)
    numbers = packed[..., :count].view(torch.int8).unflatten(-1, (-1, GROUP))
    scales = packed[..., count:].contiguous().view(torch.float32).unsqueeze(-1)
    return (numbers * scales).flatten(-2)


class _OnStream:
    def __init__(self, done: Any) -> None:
        self._done = done

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._done)


class _InThread:
    def __init__(self, sum_: "Future[None]") -> None:
        self._sum = sum_

    def wait(self) -> None:
        self._sum.result()


@functools.cache
def _thread() -> ThreadPoolExecutor:
    """A single thread, because all ranks must run their sums in the same order."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="int8-sums")
