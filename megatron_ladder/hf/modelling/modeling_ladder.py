# SPDX-License-Identifier: Apache-2.0
"""A Llama-family decoder with a choice of residual: standard, ladder, parallel (arXiv 2501.06589), or both.

This file is copied into the folders of exported models. It imports only torch and transformers (>=5.0,<6).
The tests compare the tensor-parallel training code with it, so it is written to be easy to read.

The parameters have Llama's names. A layer passes two states to the next layer: `m`, the residual stream,
and `a`, the residual stream without the last output that was added to it. Both states are
[batch, length, hidden] and start as the embedding. The final norm reads `m`.

    standard          a' = m + attn(norm1(m))    m' = a' + mlp(norm2(a'))
    ladder            a' = m + attn(norm1(a))    m' = a' + mlp(norm2(m))
    parallel          a' = m                     m' = m + attn(norm1(m)) + mlp(norm1(m))
    parallel-ladder   a' = m                     m' = m + attn(norm1(a)) + mlp(norm1(a))

With `residual_scaling` the outputs of attn and mlp are multiplied by a number before they are added. In
place of the mlp a layer may have a mixture of experts (mlp_ladder.py), which reads the same state.

A ladder sub-module does not read the output of the previous sub-module, nor a parallel-ladder layer that of
the previous layer. So with tensor parallelism the all-reduce of that output can run while it computes.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_ladder import LADDERS, PARALLELS, LadderConfig
from .mlp_ladder import LadderExperts, LadderMLP
from .rotary_ladder import rope_cos_sin, rotate

# The first versions of transformers 5 need the positions of the new tokens in the cache. Later versions ask
# the cache.
_MASK_NEEDS_PLACES = "cache_position" in inspect.signature(create_causal_mask).parameters


class LadderRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def eager_attention(
    module: "LadderAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain torch, with the signature of transformers' other implementations.

    Args:
        query: [batch, heads, length, head_dim].
        key, value: [batch, key/value heads, cached, head_dim], of all cached tokens.
        attention_mask: [batch or 1, 1, length, cached], added to the scores.

    Returns:
        The output, [batch, length, heads, head_dim], and the weights, [batch, heads, length, cached].
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class LadderAttention(nn.Module):
    """Grouped-query attention: [batch, length, hidden] -> the same shape.

    transformers chooses the attention function (`config._attn_implementation`: sdpa, eager,
    flash_attention_2, ...). It reads this module's `config`, `is_causal` and `num_key_value_groups`.
    """

    is_causal = True

    def __init__(self, config: LadderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.sliding_window = config.layer_windows()[layer_idx]
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = LadderRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = LadderRMSNorm(config.head_dim, config.rms_norm_eps)

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, length, heads * head_dim] -> [batch, heads, length, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        past_key_values: Any | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        query = rotate(self.q_norm(self._heads(self.q_proj(x))), cos, sin)
        key = rotate(self.k_norm(self._heads(self.k_proj(x))), cos, sin)
        value = self._heads(self.v_proj(x))
        if past_key_values is not None:
            places = {"cache_position": cache_position}
            key, value = past_key_values.update(key, value, self.layer_idx, places)
        kind = self.config._attn_implementation
        attend = eager_attention if kind == "eager" else ALL_ATTENTION_FUNCTIONS[kind]
        # Flash attention gets the window instead of a mask.
        kwargs |= {"scaling": self.head_dim**-0.5, "sliding_window": self.sliding_window}
        out, _ = attend(self, query, key, value, mask, dropout=0.0, **kwargs)
        return self.o_proj(out.flatten(2))


class LadderDecoderLayer(GradientCheckpointingLayer):
    """One layer: the pair of states (a, m) -> the next pair; see the top of this file.

    `kwargs` are passed to the attention. They include the cache.
    """

    def __init__(self, config: LadderConfig, layer_idx: int) -> None:
        super().__init__()
        is_ladder = layer_idx in config.ladder_layer_indices()
        self.residual = (
            config.residual if is_ladder else LADDERS.get(config.residual, config.residual)
        )
        self.self_attn = LadderAttention(config, layer_idx)
        has_experts = layer_idx in config.expert_layers()
        self.mlp = LadderExperts(config) if has_experts else LadderMLP(config)
        norm = LadderRMSNorm if config.layer_norms else nn.Identity
        self.input_layernorm = norm(config.hidden_size, config.rms_norm_eps)
        if self.residual not in PARALLELS:
            self.post_attention_layernorm = norm(config.hidden_size, config.rms_norm_eps)
        self.residual_scale = config.residual_scale()
        if self.residual_scale is None:  # of attention's and the MLP's output, or of their sum
            self.residual_scales = nn.Parameter(torch.zeros(2 - (self.residual in PARALLELS)))

    def scaled(self, output: Tensor, which: int) -> Tensor:
        """The output of attention (`which` 0) or of the MLP (-1) as it is added."""
        if self.residual_scale is None:
            return output * self.residual_scales[which]
        return output if self.residual_scale == 1 else output * self.residual_scale

    def forward(
        self, a: Tensor, m: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        is_ladder = self.residual in LADDERS
        normed = self.input_layernorm(a if is_ladder else m)
        attended = m + self.scaled(self.self_attn(normed, cos, sin, mask, **kwargs), 0)
        if self.residual in PARALLELS:
            return m, attended + self.scaled(self.mlp(normed), -1)
        mlp_reads = m if is_ladder else attended
        a = attended
        m = a + self.scaled(self.mlp(self.post_attention_layernorm(mlp_reads)), -1)
        return a, m


class LadderPreTrainedModel(PreTrainedModel):
    config_class: type[LadderConfig] = LadderConfig
    base_model_prefix = "model"
    _no_split_modules = ["LadderDecoderLayer"]  # noqa: RUF012 (transformers' own name)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012

    def __init__(self, config: LadderConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.expert_layers():  # which experts compute depends on the tokens
            self._can_compile_fullgraph = False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # else transformers guesses it from this file's text, each version differently


def _check_covers(attention_mask: Any, length: int) -> None:
    """Raises ValueError when a two-dimensional mask does not cover all cached and new tokens.

    transformers would apply a mask of the new tokens alone to the first cached ones, and mask the new ones.
    """
    two_dimensional = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2
    if two_dimensional and attention_mask.shape[1] != length:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}: it must be [batch, {length}], "
            "one value for each cached and new token"
        )


class LadderModel(LadderPreTrainedModel):
    def __init__(self, config: LadderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [LadderDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = LadderRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the layers.

        Args:
            input_ids: [batch, length]. Give either this or `inputs_embeds`.
            attention_mask: [batch, cached + length], 0 for padding, which may be on either side. Or
                transformers' prepared mask with four dimensions, one or a dictionary by type of layer.
            position_ids: [batch or 1, length]. None: positions are counted from the first cached token.
            past_key_values: any cache of transformers. None: a DynamicCache is made when `use_cache`.
            inputs_embeds: [batch, length, hidden].
            use_cache: None: `config.use_cache`.
            output_hidden_states: also return the embedding and `m` of each layer. The last one is
                normalised.
            kwargs: for the attention implementation.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given, or the mask does not
                cover the cached and the new tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embedding = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        # A static cache returns a tensor, so that one compiled graph works for every position.
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        length = embedding.shape[1]
        if isinstance(past_length, int):
            _check_covers(attention_mask, past_length + length)
        places = {"cache_position": torch.arange(length, device=embedding.device) + past_length}
        if position_ids is None:
            position_ids = places["cache_position"][None]
        cos, sin = rope_cos_sin(self.config, position_ids, embedding.dtype)
        about = {"past_key_values": past_key_values, "position_ids": position_ids}
        about |= places if _MASK_NEEDS_PLACES else {}
        masks, windows = {}, self.config.layer_windows()
        for window in set(windows):
            make = create_sliding_window_causal_mask if window else create_causal_mask
            kind = "sliding_attention" if window else "full_attention"
            given = attention_mask[kind] if isinstance(attention_mask, dict) else attention_mask
            masks[window] = make(self.config, embedding, given, **about)

        # Flash attention finds the sequences that are packed into one by their positions.
        kwargs |= {"position_ids": position_ids, **places}
        a = m = embedding
        states = [m]
        for layer, window in zip(self.layers, windows, strict=True):
            mask = masks[window]
            # Gradient checkpointing needs the states as positional arguments, and the cache by name.
            a, m = layer(a, m, cos, sin, mask, past_key_values=past_key_values, **kwargs)
            states.append(m)
        kwargs |= {"mask": mask, "past_key_values": past_key_values}
        states[-1] = self.norm(self._final_input(states, **kwargs))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _final_input(self, states: list[Tensor], **kwargs: Any) -> Tensor:
        """What the final norm reads, of the embedding and the `m` of each layer: the last one. A model with
        a side network (modeling_side.py) reads them all, and uses `kwargs`."""
        return states[-1]


class LadderForCausalLM(LadderPreTrainedModel, GenerationMixin):
    _model_class = LadderModel
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LadderConfig) -> None:
        super().__init__(config)
        self.model = self._model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Computes the logits, [batch, length, vocab_size], and with `labels` the loss.

        The other arguments are those of `LadderModel.forward`.

        Args:
            labels: [batch, length], the input ids (they are shifted here), or -100 where a token does not
                count.
            logits_to_keep: with an int N, only the logits of the last N positions (0: all of them). With a
                tensor, only the logits of the positions in it.
            num_items_in_batch: the summed loss is divided by this. None: by the number of counted labels.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            predictions = logits[:, :-1].flatten(0, 1).float()
            targets = labels[:, 1:].flatten().to(logits.device)
            if num_items_in_batch is None:
                loss = F.cross_entropy(predictions, targets)
            else:
                loss = F.cross_entropy(predictions, targets, reduction="sum") / num_items_in_batch
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
