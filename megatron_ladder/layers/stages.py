"""Ladder models over pipeline stages: the tensors that stages send, and the links between layers."""

import copy
from typing import Any

import torch
from torch import Tensor

from megatron_ladder.layers.halves import join


def pack(a: Tensor, y: Tensor) -> Tensor:
    """Packs the pair of states, both complete, in the one tensor that a stage sends.

    Args:
        a: [s, b, h].
        y: [s, b, h].

    Returns:
        [s, b, 2h].
    """
    return torch.cat((a, y), dim=-1)


def unpack(x: Tensor, hidden_size: int) -> tuple[Tensor, Tensor | None]:
    """Unpacks the tensor that the previous stage sent, [s, b, 2h], to the pair (a, y), each [s, b, h].

    When `x` is one state, [s, b, h], it returns (x, None).
    """
    if x.size(-1) == hidden_size:
        return x, None
    a, y = x.chunk(2, dim=-1)
    return a.contiguous(), y.contiguous()


def complete_state(layer: Any, output: Tensor, context: Any) -> Tensor:
    """The state with all outputs, m, of what a layer has returned. It waits for the layer's last output.

    Args:
        layer: in training mode: in evaluation mode outputs become the states that they are added to.
        output, context: what its forward returned.

    Returns:
        [s, b, h], or [s/tp, b, h] with sequence parallelism.
    """
    if context is None:
        a, y = unpack(output, layer.config.hidden_size)
        return a if y is None else layer._add(a, y)
    *complete, a = context if isinstance(context, tuple) else (context,)
    return join((*complete, layer._add(a, output)))


def connect(layers: list[Any]) -> None:
    """Links each layer of this stage to its next layer, and marks the last one.

    Args:
        layers: the stage's layers (LadderTransformerLayer), first to last.
    """
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        layer.is_last_of_stage = following is None
        layer.next_layer = () if following is None else (following,)


def sent_config(config: Any, *, sends_pair: bool) -> Any:
    """The configuration for megatron-core's schedules.

    The schedules take the shape of the tensors that stages send from it: [s, b, hidden_size]. When stages
    send a pair, hidden_size is doubled here. The modules keep their own configuration.
    """
    if not sends_pair or config.pipeline_model_parallel_size == 1:
        return config
    seen = copy.copy(config)
    seen.hidden_size = 2 * config.hidden_size
    return seen
