"""Named ranges in a profiler's timeline: each sub-module, and where a collective is started and waited for.

Off, as they mostly are, they cost a look at a flag.
"""

import contextlib
from collections.abc import Iterator

import torch

_is_on = False
_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Ranges inside are seen by torch's profiler, and on a GPU by Nsight Systems (NVTX)."""
    global _is_on
    _is_on = True
    try:
        yield
    finally:
        _is_on = False


def named(name: str) -> contextlib.AbstractContextManager[object]:
    """A range around its body."""
    return _range(name) if _is_on and not torch.compiler.is_compiling() else _NOTHING


@contextlib.contextmanager
def _range(name: str) -> Iterator[None]:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.nvtx.range_push(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if on_gpu:
            torch.cuda.nvtx.range_pop()
