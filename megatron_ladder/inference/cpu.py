"""Runs megatron-core's inference engines on a machine without a GPU.

cpu_platform.py patches what training needs. The engines need more: events and streams for timing and
copies, pinned memory, profiler ranges, and a check that flash-attn is installed. attention.py replaces
flash-attn.
"""

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_ladder import cpu_platform

_PINNING_FACTORIES = ("empty", "empty_like", "full", "ones", "tensor", "zeros")
_enabled = False


class _Event:
    """Replaces torch.cuda.Event on a CPU, where all work is done when a call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._at = 0.0

    def record(self, *_: Any) -> None:
        self._at = time.perf_counter()

    def wait(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        """The time from this event to `end`, in milliseconds."""
        return (end._at - self._at) * 1e3


class _Stream:
    """Replaces torch.cuda.Stream on a CPU, which has one stream, so nothing waits."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        pass

    def wait_event(self, *_: Any) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None:
        pass


def enable() -> None:
    """Patches torch and megatron-core so that the inference engines run on the CPU, when there is no GPU.

    Call it before megatron-core's engines are imported. A second call changes nothing.
    """
    global _enabled
    if not cpu_platform.enable() or _enabled:
        return
    cuda: Any = torch.cuda
    cuda.Event, cuda.Stream = _Event, _Stream
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.current_stream = lambda *_: _Stream()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None
    for name in _PINNING_FACTORIES:
        setattr(torch, name, _unpinned(getattr(torch, name)))
    from megatron.core.inference import communication_utils
    from megatron.core.inference.contexts import dynamic_context
    from megatron.core.transformer import attention

    communication_utils._is_cuda = lambda _: None
    # This is a Triton kernel. Without it the context writes to the cache by indexing.
    dynamic_context.triton_append_key_value_cache = None
    # Attention checks that flash-attn 3 or 2 is there, before it calls the method that attention.py
    # overrides.
    attention.HAVE_FA3 = True
    _enabled = True


def _unpinned(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return wrapper
