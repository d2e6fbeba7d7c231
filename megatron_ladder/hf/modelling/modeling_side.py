# SPDX-License-Identifier: Apache-2.0
"""A ladder model with a side network beside it (ladder side-tuning, arXiv 2206.06522).

This file is copied into the folders of exported models, beside modeling_ladder.py. The backbone's tensors
have the names that they have in a folder without a side network. Layer i of the backbone leaves the state
m_i. The side network has a state s of its own, [batch, length, hidden / r], and for each kept layer i a
gate and a block of a standard model with fewer channels:

    s = first(embedding)
    s = block_i(mu s + (1 - mu) down_i(m_i)),  mu = sigmoid(gate_i / T)
    the final norm reads up(s), or m + up(s)
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .configuration_ladder import LadderConfig
from .modeling_ladder import LadderDecoderLayer, LadderForCausalLM, LadderModel, rope_cos_sin

TEMPERATURE = 0.1


class LadderSideConfig(LadderConfig):
    """The fields of the backbone's configuration, and two more.

    Args:
        side_reduction: r; widths of the side network are the backbone's, divided by it.
        side_layers: the layers whose states the side network reads, from 0, ascending. None: all.

    Raises:
        ValueError: a width is not a multiple of `side_reduction`, or a layer does not exist.
    """

    model_type = "ladder-side"

    def __init__(
        self,
        side_reduction: int = 8,
        side_layers: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        layers = range(self.num_hidden_layers)
        self.side_reduction = side_reduction
        self.side_layers = list(layers if side_layers is None else side_layers)
        widths = (self.hidden_size, self.intermediate_size, self.head_dim)
        if any(width % side_reduction for width in widths):
            raise ValueError(f"side_reduction {side_reduction} does not divide {widths}")
        if self.side_layers != sorted(set(self.side_layers) & set(layers)):
            raise ValueError(f"side_layers {self.side_layers}: ascending numbers in {layers}")

    def blocks(self) -> LadderConfig:
        """The configuration of the model that has the side network's blocks."""
        r = self.side_reduction
        return LadderConfig(
            hidden_size=self.hidden_size // r,
            intermediate_size=self.intermediate_size // r,
            num_hidden_layers=len(self.side_layers),
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim // r,
            max_position_embeddings=self.max_position_embeddings,
            rms_norm_eps=self.rms_norm_eps,
            rope_parameters=self.rope_parameters,
            residual="standard",
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            initializer_range=self.initializer_range,
        )


class LadderSideBlock(nn.Module):
    """One gate, its down-projection and its block."""

    def __init__(self, hidden_size: int, blocks: LadderConfig, layer_idx: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        self.down = nn.Linear(hidden_size, blocks.hidden_size, bias=False)
        self.layer = LadderDecoderLayer(blocks, 0)
        self.layer.self_attn.layer_idx = layer_idx  # of the cache, behind the backbone's

    def forward(self, side: Tensor, state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mu = torch.sigmoid(self.gate / TEMPERATURE)
        side = mu * side + (1 - mu) * self.down(state)
        return self.layer(side, side, *args, **kwargs)[1]


class LadderSideNetwork(nn.Module):
    def __init__(self, config: LadderSideConfig) -> None:
        super().__init__()
        self.config = config.blocks()
        h, small = config.hidden_size, self.config.hidden_size
        self.first = nn.Linear(h, small, bias=False)
        self.blocks = nn.ModuleList(
            LadderSideBlock(h, self.config, config.num_hidden_layers + place)
            for place in range(len(config.side_layers))
        )
        self.up = nn.Linear(small, h, bias=False)


class LadderSideModel(LadderModel):
    config_class = LadderSideConfig

    def __init__(self, config: LadderSideConfig) -> None:
        super().__init__(config)
        self.side = LadderSideNetwork(config)
        self.post_init()

    def _final_input(self, states: list[Tensor], **kwargs: Any) -> Tensor:
        config, side, mask = self.config, self.side, kwargs.pop("mask")
        side.config._attn_implementation = config._attn_implementation
        if kwargs["past_key_values"] is not None:
            layers = config.num_hidden_layers + len(config.side_layers)
            _make_room(kwargs["past_key_values"], layers)
        cos, sin = rope_cos_sin(side.config, kwargs["position_ids"], states[0].dtype)
        x = side.first(states[0])
        for block, layer in zip(side.blocks, config.side_layers, strict=True):
            x = block(x, states[layer + 1], cos, sin, mask, **kwargs)
        return side.up(x)


def _make_room(cache: Any, layers: int) -> None:
    """Makes a cache large enough for the side network's layers, which have fewer channels."""
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"a side-tuned model takes a DynamicCache, not a {type(cache).__name__}")
    while len(cache.layers) < layers:
        cache.layers.append(DynamicLayer())


class LadderSideForCausalLM(LadderForCausalLM):
    config_class = LadderSideConfig
    _model_class = LadderSideModel
