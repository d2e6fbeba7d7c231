"""A second CUDA stream for the chain between two sub-modules under sequence parallelism.

The chain is reduce-scatter -> add -> norm -> all-gather. It depends on the previous sub-module, not on the
sub-module that is computing. On a stream of its own the whole chain overlaps with the computing sub-module.
Autograd runs the backward of each node on the stream of its forward, so the chain of backward overlaps in
the same way. On a CPU there is one stream, and the layer runs the chain between the sub-module's GEMMs
(layer.py).
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _second_stream() -> torch.cuda.Stream:
    # High priority: its few small kernels run before the thread blocks of a GEMM that still wait.
    return torch.cuda.Stream(priority=-1)


def host_runs_ahead() -> bool:
    """Whether the host launches work and does not do it (a GPU). Then it waits where it reads a result."""
    return torch.cuda.is_available()


def moment() -> Any:
    """An event at the present point of the current stream's work; `beside` waits for it. None on a CPU."""
    return torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None


@contextlib.contextmanager
def beside(since: Any, *inputs: Tensor | None) -> Iterator[None]:
    """Runs its block on the second stream, once the work before `since` is done.

    Args:
        since: from `moment`. Everything that the block reads was made before it, or is in flight and is
            waited for in the block. None: the block runs as usual.
        inputs: the tensors that the block reads.
    """
    if since is None:
        yield
        return
    stream = _second_stream()
    stream.wait_event(since)
    for x in inputs:
        if x is not None:
            x.record_stream(stream)
    with torch.cuda.stream(stream):
        yield


def rejoin(*outputs: Tensor | None) -> None:
    """Makes the current stream wait for the second stream.

    Args:
        outputs: tensors of the second stream that the current stream will read.
    """
    if not torch.cuda.is_available():
        return
    current = torch.cuda.current_stream()
    current.wait_stream(_second_stream())
    for x in outputs:
        if x is not None:
            x.record_stream(current)
