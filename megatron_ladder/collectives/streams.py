"""A second CUDA stream for the chain between two sub-modules under sequence parallelism.

reduce-scatter -> add -> norm -> all-gather depends on the sub-module before, not on the one that is
computing. On its own stream the whole of it runs in that one's shadow; autograd runs each node's
backward on the stream of its forward, so backward's chain does the same. On a CPU there is one
stream, and the layer places the chain between the sub-module's GEMMs (layer.py).
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _second_stream() -> torch.cuda.Stream:
    # Its few small kernels go before what is left of a GEMM's.
    return torch.cuda.Stream(priority=-1)


def moment() -> Any:
    """Now, in the current stream's work: `beside` can begin there later on."""
    return torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None


@contextlib.contextmanager
def beside(since: Any, *inputs: Tensor | None) -> Iterator[None]:
    """Runs its body on the second stream, from `since` on.

    Args:
        since: a `moment` after which everything the body reads was made or, being in flight, is
            waited for in the body.
        inputs: what the body reads.
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
    """Makes the current stream wait for the second one, whose results it is going to read."""
    if not torch.cuda.is_available():
        return
    current = torch.cuda.current_stream()
    current.wait_stream(_second_stream())
    for x in outputs:
        if x is not None:
            x.record_stream(current)
