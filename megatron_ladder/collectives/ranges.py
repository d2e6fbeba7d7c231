"""Named ranges for a profiler's timeline: the sub-modules, and the starts and waits of collectives.

They are off by default. A range that is off costs one check of a flag.
"""

import contextlib
from collections.abc import Iterator

import torch

_is_on = False
_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Turns the ranges on inside its block, for torch's profiler and (on a GPU) Nsight Systems (NVTX)."""
    global _is_on
    _is_on = True
    try:
        yield
    finally:
        _is_on = False


def named(name: str) -> contextlib.AbstractContextManager[object]:
    """A context manager that records its block as a range called `name`, when ranges are on."""
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
