"""One forward pass that keeps what each sub-module adds to the residual stream; a layer can be skipped.

A layer is skipped by making its two sub-modules add nothing. The residual stream after the layer is then
the stream before it, for every residual kind. A ladder layer passes on a pair of states; when it is
skipped, both are the stream before it, so the next layer's attention reads the same state that its output
is added to.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ladder.hf.modelling.modeling_ladder import LadderForCausalLM


@dataclass(frozen=True)
class Pass:
    """The results of one sequence's forward pass, all in fp32."""

    states: Tensor
    """[layers + 1, length, hidden]: the residual stream before each layer, and after the last."""
    attention: Tensor
    """[layers, length, hidden]: what each layer's attention adds to the residual stream."""
    mlp: Tensor
    """[layers, length, hidden]: what each layer's MLP adds to the residual stream."""
    logits: Tensor
    """[length, vocab_size]."""

    @property
    def layer(self) -> Tensor:
        """[layers, length, hidden]: what each layer adds to the residual stream."""
        return self.attention + self.mlp


@torch.no_grad()
def run(
    model: LadderForCausalLM,
    ids: Tensor,
    skip: int | None = None,
    positions: slice = slice(None),
) -> Pass:
    """Runs the model over one sequence. The model is not changed.

    Args:
        ids: int64 [length], on the model's device.
        skip: the layer to skip; None skips none.
        positions: the positions of the sequence at which it is skipped.
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
            # What attention's last matrix gives, and the MLP or the experts, scaled, is what they add, for
            # every residual kind.
            parts = ((layer.self_attn.o_proj, attention, 0), (layer.mlp, mlp, -1))
            for module, kept, which in parts:
                if index == skip:
                    hook(module, nothing)  # before `_keep`, which must keep what is really added
                hook(module, partial(_keep, kept, scaled=partial(layer.scaled, which=which)))
            hook(layer, lambda pair: _keep(states, pair[1]))
        logits = model(ids[None], use_cache=False).logits[0].float()
    return Pass(torch.stack(states), torch.stack(attention), torch.stack(mlp), logits)


def _keep(
    kept: list[Tensor], output: Tensor, scaled: Callable[[Tensor], Tensor] = Tensor.detach
) -> None:
    kept.append(scaled(output)[0].float())
