"""A micro-batch in two halves: while the sum of one half's output runs, the other half computes.

Each sequence is computed as before, so losses and gradients stay those of the whole micro-batch, to
rounding. (Domino, arXiv 2409.15241, section 3.2, splits the batch as well.)
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Submodule = Literal["attention", "mlp", "both"]
"""both: attention and MLP of parallel kinds. They read one input, and their outputs are summed together."""
Call = tuple[Submodule, int]
"""A sub-module, and which half of the micro-batch it computes (0 without halves)."""


def calls_of(submodules: Sequence[Submodule], halves: bool) -> list[tuple[Call, Call | None]]:
    """A layer's calls of its sub-modules in their order, each with the one after it."""
    calls = [(name, half) for name in submodules for half in range(1 + halves)]
    return list(zip(calls, [*calls[1:], None], strict=True))


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of a state: [s, b, h] -> two of [s, b/2, h].

    Raises:
        ValueError: b is odd.
    """
    if x.size(1) % 2:
        raise ValueError(f"a micro-batch of {x.size(1)} sequences has no two equal halves")
    first, second = x.chunk(2, dim=1)
    return first.contiguous(), second.contiguous()


def join(states: tuple[Tensor, ...]) -> Tensor:
    """One state of all halves: [s, b, h]. A state that is alone is returned as it is."""
    return states[0] if len(states) == 1 else torch.cat(states, dim=1)


def half_of(kwargs: dict[str, Any], half: int) -> dict[str, Any]:
    """Self-attention's arguments for one half."""
    documents = kwargs.get("packed_seq_params")
    return kwargs if documents is None else {**kwargs, "packed_seq_params": documents.halves[half]}
