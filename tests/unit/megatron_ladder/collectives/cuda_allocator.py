"""A stand-in for CUDA's streams and for its caching allocator, on CPU tensors.

The allocator gives a tensor's memory out again as soon as the tensor is freed, to work on the stream that
was current when it was made. Work of other streams that still reads or writes it is not waited for, unless
`record_stream` has named these streams. On a CPU nothing of this can be seen. So this stand-in follows
every tensor: the stream that made it, the streams on which operations used it, and those recorded.

A collective runs on a stream of its own. Its `wait` makes the stream wait that is current then, and lets go
of the tensors. From then on it is as if that stream had used them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(eq=False)
class Stream:
    name: str

    def record_event(self) -> "Stream":
        return self

    def wait_event(self, _: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...


@dataclass
class _Memory:
    tensor: Tensor
    """Kept, so that no other tensor gets the same address."""
    made_on: Stream
    used_on: set[Stream] = field(default_factory=set)
    recorded: set[Stream] = field(default_factory=set)


class Allocator(TorchDispatchMode):
    """In its `with` block it follows all tensors; `streams` gives the streams."""

    def __init__(self) -> None:
        super().__init__()
        self.main = self.current = Stream("main")
        self._memory: dict[int, _Memory] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, Tensor):
                self.used(x)
        return result

    def used(self, x: Tensor) -> None:
        """By work on the current stream; a new tensor was made there."""
        self._of(x).used_on.add(self.current)

    def record(self, x: Tensor, stream: Stream) -> None:
        self._of(x).recorded.add(stream)

    def _of(self, x: Tensor) -> _Memory:
        address = x.untyped_storage()._cdata
        return self._memory.setdefault(address, _Memory(x, self.current))

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def check(self) -> None:
        """Fails when memory could be given out again under work that still uses it."""
        for memory in self._memory.values():
            for stream in memory.used_on - memory.recorded - {memory.made_on}:
                shape = tuple(memory.tensor.shape)
                raise AssertionError(
                    f"a tensor {shape} of stream {memory.made_on.name} is used on {stream.name}: the "
                    "allocator was not told"
                )


class Collectives:
    """In place of NCCL's: what they write is zeros."""

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator

    def start(self, *tensors: Tensor, **_: Any) -> "Work":
        return Work(self._allocator, [x for x in tensors if isinstance(x, Tensor)])


@dataclass
class Work:
    allocator: Allocator
    tensors: list[Tensor]

    def wait(self) -> None:
        for x in self.tensors:
            self.allocator.used(x)
        self.tensors = []


def pretend_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch, allocator: Allocator) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, s: allocator.record(x, s))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: allocator.current)
    monkeypatch.setattr(torch.cuda, "stream", allocator.on)
    monkeypatch.setattr(torch.cuda, "Stream", lambda **_: Stream("second"))
