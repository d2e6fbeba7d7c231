"""One forward pass with all that its sub-modules add to the residual stream, and with a layer skipped.

A layer is skipped where its two sub-modules add nothing: the residual stream after it is the one
before it. That holds for every residual kind. Of a ladder model's pair of states both are then the
stream before the layer, so the next layer's attention reads what its output is added to.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ladder.hf.modeling_ladder import LadderForCausalLM


@dataclass(frozen=True)
class Pass:
    """What one sequence's forward pass computed; fp32."""

    states: Tensor
    """[layers + 1, length, hidden]: the residual stream before each layer, and after the last."""
    attention: Tensor
    """[layers, length, hidden]: what the attentions add to it."""
    mlp: Tensor
    """[layers, length, hidden]: what the MLPs add to it."""
    logits: Tensor
    """[length, vocab_size]."""

    @property
    def layer(self) -> Tensor:
        """[layers, length, hidden]: what the layers add to it."""
        return self.attention + self.mlp


@torch.no_grad()
def run(
    model: LadderForCausalLM,
    ids: Tensor,
    skip: int | None = None,
    positions: slice = slice(None),
) -> Pass:
    """Runs the model over one sequence; the model is left as it was.

    Args:
        ids: [length], on the model's device.
        skip: the layer to skip; None skips none.
        positions: where it is skipped.
    """
    states: list[Tensor] = []
    attention: list[Tensor] = []
    mlp: list[Tensor] = []
    layers: Any = model.model.layers
    with ExitStack() as hooks:

        def hook(module: Any, act: Callable[[Any], Any]) -> None:
            handle = module.register_forward_hook(lambda _module, _inputs, output: act(output))
            hooks.callback(handle.remove)

        def nothing(output: Tensor) -> Tensor:
            output = output.clone()
            output[:, positions] = 0
            return output

        hook(model.model.embed_tokens, partial(_keep, states))
        for index, layer in enumerate(layers):
            # The last matrices: their output is what is added, whatever is around them.
            parts = ((layer.self_attn.o_proj, attention), (layer.mlp.down_proj, mlp))
            for module, kept in parts:
                if index == skip:
                    hook(module, nothing)  # first, so that what is kept is what is added
                hook(module, partial(_keep, kept))
            hook(layer, lambda pair: _keep(states, pair[1]))
        logits = model(ids[None], use_cache=False).logits[0].float()
    return Pass(torch.stack(states), torch.stack(attention), torch.stack(mlp), logits)


def _keep(kept: list[Tensor], output: Tensor) -> None:
    kept.append(output[0].float())
