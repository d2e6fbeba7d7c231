"""Tensor-parallel collectives over a modelled link.

Inside `over` each collective of the tensor-parallel group runs as always, but it is not complete before a
link of the given speed has carried its message. That link begins with a message when the last rank has
started it, because a sum needs the part of every rank, and it carries one message after another. It is the
same for every residual kind and for megatron-core's own layers. Only the time that a message is under way
is modelled. The sums, and the copies that they need, are real.
"""

import contextlib
import functools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers, mappings

from megatron_ladder.collectives.names import ALL_GATHER, REDUCE_SCATTER

# When megatron-core is imported, it binds two of torch's collectives to names of its own. torch has two
# names for each of them; this project uses the newer ones.
_ENTRIES: tuple[tuple[Any, str, str], ...] = (
    (dist, "all_reduce", "all-reduce"),
    *((dist, name, "all-gather") for name in {"all_gather_into_tensor", ALL_GATHER}),
    *((dist, name, "reduce-scatter") for name in {"reduce_scatter_tensor", REDUCE_SCATTER}),
    (dist, "all_to_all_single", "all-to-all"),
    (mappings, "dist_all_gather_func", "all-gather"),
    (mappings, "dist_reduce_scatter_func", "reduce-scatter"),
    (layers, "dist_all_gather_func", "all-gather"),
    (layers, "dist_reduce_scatter_func", "reduce-scatter"),
)

LinkSeconds = Callable[[str, int], float]
"""(collective, bytes of the whole message) -> seconds that the message is under way."""


class Observer(Protocol):
    """An object whose methods `over` calls for every collective (recorder.py). Times are seconds."""

    def started(self, operation: str, at_s: float) -> Any: ...

    def waited(self, key: Any, since_s: float, until_s: float, arrived_s: float) -> None: ...


class _Link:
    """Carries one message after another, each from the moment when the last rank has started it.

    The ranks are processes of one machine with one monotonic clock. They tell each other through shared
    memory when they have started a message.
    """

    SLOTS = 1 << 12  # messages, more than any step has

    def __init__(self, starts: np.ndarray, rank: int) -> None:
        self._starts, self._rank = starts, rank
        starts[:, rank] = 0.0
        self._seconds: list[float] = []
        self._arrivals: list[float] = []

    def start(self, seconds: float) -> int:
        """Starts this rank's part of the next message; returns the message's number."""
        number = len(self._seconds)
        assert number < self.SLOTS
        self._seconds.append(seconds)
        self._starts[number, self._rank] = time.perf_counter()
        return number

    def arrival(self, number: int) -> float:
        """When the message arrives, once every rank has started it."""
        for n in range(len(self._arrivals), number + 1):
            free_s = self._arrivals[-1] if self._arrivals else 0.0
            self._arrivals.append(max(self._starts[n].max(), free_s) + self._seconds[n])
        return self._arrivals[number]


@functools.cache
def _shared_starts(group: dist.ProcessGroup) -> np.ndarray:
    """[messages, ranks] seconds in memory that the group's ranks share."""
    shape = (_Link.SLOTS, group.size())
    if dist.get_backend(group) == "fake" or group.size() == 1:
        return np.zeros(shape)
    name: list[str | None] = [None]
    if group.rank() == 0:
        descriptor, name[0] = tempfile.mkstemp(prefix="starts-")
        os.ftruncate(descriptor, math.prod(shape) * 8)
        os.close(descriptor)
    dist.broadcast_object_list(name, group=group, group_src=0)
    assert name[0] is not None
    starts = np.memmap(name[0], dtype=np.float64, mode="r+", shape=shape)
    dist.barrier(group=group)
    if group.rank() == 0:
        Path(name[0]).unlink()  # the memory stays while it is mapped
    return starts


class _Flight:
    """A collective under way."""

    def __init__(
        self, work: Any, link: _Link, number: int, observer: Observer | None, key: Any
    ) -> None:
        self._work, self._link, self._number = work, link, number
        self._observer, self._key = observer, key
        self._landed = False

    def wait(self, *_: Any) -> bool:
        if self._landed:
            return True
        since = time.perf_counter()
        self._work.wait()
        worked = time.perf_counter()
        lands_s = self._link.arrival(self._number)
        sleep_until(lands_s)
        self._landed = True
        if self._observer is not None:
            # gloo does not say when it has finished. If this rank did not have to wait for gloo, it counts
            # as finished in time for the link.
            arrived = worked if worked - since > 1e-4 else lands_s
            until = time.perf_counter()
            self._observer.waited(self._key, since, until, max(arrived, lands_s))
        return True

    def is_completed(self) -> bool:
        return self._landed


class _CudaFlight:
    """On a GPU the link is a stream that a kernel keeps busy. The host does not wait.

    Like a collective's kernel, that kernel needs a free multiprocessor to begin. So the stream has the
    priority that NCCL's streams have (pretrain/model/queues.py).
    """

    _stream: torch.cuda.Stream | None = None

    def __init__(self, work: Any, seconds: float) -> None:
        self._work = work
        if _CudaFlight._stream is None:
            high = os.environ.get("TORCH_NCCL_HIGH_PRIORITY", "0").lower() in (
                "1",
                "y",
                "t",
                "true",
            )
            _CudaFlight._stream = torch.cuda.Stream(priority=-1 if high else 0)
        stream = _CudaFlight._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(int(seconds * _cycles_per_second()))
            self._done = stream.record_event()

    def wait(self, *_: Any) -> bool:
        self._work.wait()
        torch.cuda.current_stream().wait_event(self._done)
        return True


@functools.cache
def _cycles_per_second() -> float:
    """The rate of the clock whose cycles torch.cuda._sleep counts."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 50_000_000
    for _ in range(2):  # the first warms up
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize()
    return cycles / (begin.elapsed_time(end) / 1000)


def own_seconds(group: dist.ProcessGroup, x: torch.Tensor) -> float:
    """Seconds of an all-reduce of a message like `x`, on ranks that do nothing else.

    A collective is under way for this time and the modelled link's time together.
    """
    times = []
    for _ in range(20):
        message = torch.zeros_like(x)
        dist.barrier(group=group)
        begin = time.perf_counter()
        dist.all_reduce(message, group=group)
        times.append(time.perf_counter() - begin)
    slowest = torch.tensor(statistics.median(times), dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    return slowest.item()


def sleep_until(moment_s: float) -> None:
    """Sleeps until shortly before `moment_s`, then spins, because a sleep ends late.

    `moment_s` is a time of time.perf_counter. Other threads can run meanwhile.
    """
    while (left := moment_s - time.perf_counter()) > 0:
        time.sleep(left - 2e-4 if left > 3e-4 else 0)


@contextlib.contextmanager
def over(
    group: dist.ProcessGroup,
    seconds: LinkSeconds,
    observer: Observer | None = None,
    *,
    blocking: bool = False,
) -> Iterator[None]:
    """Inside this block, the collectives of `group` go over a modelled link.

    Args:
        seconds: the time of each message on the link.
        observer: is told of each collective on a CPU, not on a GPU.
        blocking: each collective is waited for where it starts, so that nothing is hidden.
    """
    starts = _shared_starts(group)
    link = _Link(starts, group.rank())
    if group.size() > 1 and dist.get_backend(group) != "fake":
        dist.barrier(group=group)  # every rank has cleared its column

    def wrapped(real: Callable, operation: str) -> Callable:
        @functools.wraps(real)
        def collective(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            if kwargs.get("group") is not group:
                return real(*args, async_op=async_op, **kwargs)
            size = max(x.numel() * x.element_size() for x in args[:2] if torch.is_tensor(x))
            flight: Any
            if args[0].is_cuda:
                work = real(*args, async_op=True, **kwargs)
                flight = _CudaFlight(work, seconds(operation, size))
            else:
                key = observer.started(operation, time.perf_counter()) if observer else None
                number = link.start(seconds(operation, size))
                work = real(*args, async_op=True, **kwargs)
                flight = _Flight(work, link, number, observer, key)
            if blocking or not async_op:
                flight.wait()
            return flight if async_op else None

        return collective

    with _replaced_by(wrapped):
        yield


@contextlib.contextmanager
def waiting_at_once(group: dist.ProcessGroup) -> Iterator[None]:
    """Inside this block each collective of `group` is waited for where it starts, so nothing is hidden.

    No link is modelled.
    """

    def wrapped(real: Callable, _operation: str) -> Callable:
        @functools.wraps(real)
        def collective(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            work = real(*args, async_op=async_op, **kwargs)
            if async_op and kwargs.get("group") is group:
                work.wait()
            return work

        return collective

    with _replaced_by(wrapped):
        yield


@contextlib.contextmanager
def _replaced_by(wrapped: Callable[[Callable, str], Callable]) -> Iterator[None]:
    """Inside this block each collective is what `wrapped` makes of it and of its operation's name."""
    real = [(module, name, getattr(module, name)) for module, name, _ in _ENTRIES]
    for module, name, operation in _ENTRIES:
        setattr(module, name, wrapped(getattr(module, name), operation))
    try:
        yield
    finally:
        for module, name, function in real:
            setattr(module, name, function)
