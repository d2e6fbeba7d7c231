"""Ladder models over pipeline stages: what crosses a boundary, and which layers know each other."""

import copy
from typing import Any

import torch
from torch import Tensor


def pack(a: Tensor, y: Tensor) -> Tensor:
    """The pair of states, both complete, as the one tensor that a stage sends. [s, b, 2h]"""
    return torch.cat((a, y), dim=-1)


def unpack(x: Tensor, hidden_size: int) -> tuple[Tensor, Tensor | None]:
    """The pair (a, y) from the stage before; or (x, None) when `x` is one state. [s, b, h]"""
    if x.size(-1) == hidden_size:
        return x, None
    a, y = x.chunk(2, dim=-1)
    return a.contiguous(), y.contiguous()


def connect(layers: list[Any]) -> None:
    """Tells this stage's ladder layers of each other, first to last."""
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        layer.is_last_of_stage = following is None
        layer.next_layer = () if following is None else (following,)


def sent_config(config: Any, *, sends_pair: bool) -> Any:
    """The configuration that megatron-core's schedules shall see: they take the shape of what
    stages send from it, [s, b, hidden_size]. The modules keep their own."""
    if not sends_pair or config.pipeline_model_parallel_size == 1:
        return config
    seen = copy.copy(config)
    seen.hidden_size = 2 * config.hidden_size
    return seen
