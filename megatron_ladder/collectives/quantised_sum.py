"""An all-reduce in 8-bit numbers, for inference: half of bf16's bytes on the link, at a small error.

As in ZeRO++ (arXiv 2306.10209) and Flash Communication (arXiv 2412.04964): each rank cuts its partial sums
into a part for every rank and makes them int8, with a scale for each group of numbers. The parts are
exchanged (all-to-all), added in fp32 by the rank they belong to, made int8 once more, and gathered. A
number is rounded once on each rank and once as a sum, each time by at most half a scale.
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
"""Numbers that share a scale, a 128th of int8's range; a scale takes four bytes."""
_SCALE_BYTES = 4


class Work(Protocol):
    """A sum in flight."""

    def wait(self) -> object: ...


def start(x: Tensor, group: dist.ProcessGroup) -> Work:
    """Begins to sum `x` over the ranks of `group`, in place, behind what the caller computes next.

    On a GPU on the second stream, on a CPU in a thread. The group's other collectives must wait until
    this one has arrived: a thread keeps no order with them.

    Args:
        x: any shape, fp32 or bf16; read it after `wait`.
    """
    if x.is_cuda:
        with streams.beside(streams.moment(), x):
            sum_in_place(x, group)
            return _OnStream(streams.moment())
    return _InThread(_thread().submit(sum_in_place, x, group))


@torch.inference_mode()
def sum_in_place(x: Tensor, group: dist.ProcessGroup) -> None:
    """All ranks get the same numbers, bit by bit."""
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
    """[..., n], n a multiple of GROUP, as bytes [..., n + n/32]: int8 numbers, then groups' fp32 scales.
    A group with NaN or infinity comes back as NaN."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    numbers = (groups / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    return torch.cat(
        [numbers.flatten(-2).view(torch.uint8), scales.squeeze(-1).view(torch.uint8)], dim=-1
    )


def from_int8(packed: Tensor) -> Tensor:
    """What `to_int8` has packed, in fp32."""
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
    """One: the ranks' sums must come in the same order."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="int8-sums")
