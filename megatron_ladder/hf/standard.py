"""A standard model as one of transformers' own: which one it is, its configuration, its tensors' names.

It is a Llama model, a Mistral model (with a window), a Qwen2 model (with biases) or a Qwen3 model (with
norms of queries and keys); with experts a Mixtral model, or a Qwen3-MoE model (with these norms).
"""

import re
from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_ladder.hf.modelling.configuration_ladder import LadderConfig
from megatron_ladder.hf.modelling.modeling_side import LadderSideConfig

T = TypeVar("T")
Makes = Mapping[str, Callable[[], Tensor]]

_SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# Mixtral's names of what Qwen3-MoE, and ours, name after Llama's MLP.
_MIXTRAL = {
    ".mlp.": ".block_sparse_moe.",
    ".gate_proj.": ".w1.",
    ".down_proj.": ".w2.",
    ".up_proj.": ".w3.",
}


def needs_code(config: LadderConfig, *, own_tokenizer: bool) -> bool:
    """Whether the folder must contain the modelling files, because transformers has no such model.

    Args:
        config: the model's configuration.
        own_tokenizer: the tokenizer was not copied from an imported model. transformers reads the tokenizer
            of a Qwen2 model by Qwen2's rules, whatever the folder says. Another tokenizer would give other
            ids. So a model with biases and its own tokenizer is not exported as Qwen2.
    """
    theirs = config.residual == "standard" and not (config.qkv_bias and config.qk_norm)
    theirs = theirs and config.residual_scaling == "none" and config.layer_norms
    if isinstance(config, LadderSideConfig):
        theirs = False
    # Of Qwen's dense layers some may have a window. Of the others' all have it, or none.
    some_windows = len(set(config.layer_windows())) > 1
    if some_windows and not ((config.qkv_bias or config.qk_norm) and config.num_experts is None):
        theirs = False
    if config.num_experts is not None:
        softmax = config.scoring_func == "softmax"
        theirs = theirs and softmax and not config.shared_expert_intermediate_size
        theirs = theirs and not config.qkv_bias
        # Mixtral has no layers without experts, and the weights of a token's experts sum to 1.
        if not config.qk_norm and (config.mlp_only_layers or not config.norm_topk_prob):
            theirs = False
    return not theirs or (config.qkv_bias and own_tokenizer)


def standard_config(config: LadderConfig) -> PreTrainedConfig:
    """transformers' own configuration of a model for which `needs_code` is False."""
    assert config.residual == "standard" and not (config.qkv_bias and config.qk_norm)
    fields = {name: copy(getattr(config, name)) for name in _SHARED_FIELDS}
    window, windows = config.sliding_window, config.layer_windows()
    if config.num_experts is not None:
        return _with_experts(config, fields)
    if not (config.qkv_bias or config.qk_norm):
        if window is None:
            return LlamaConfig(**fields)
        assert None not in windows
        return MistralConfig(**fields, sliding_window=window)
    if window is not None:
        fields |= {"use_sliding_window": True, "sliding_window": window}
        fields["layer_types"] = copy(config.layer_types)
        without = windows.count(None)
        if not any(windows[:without]):  # what older readers know: the first layers have none
            fields["max_window_layers"] = without
    return Qwen3Config(**fields) if config.qk_norm else Qwen2Config(**fields)


def _with_experts(config: LadderConfig, fields: dict[str, Any]) -> PreTrainedConfig:
    window = config.sliding_window
    width = config.moe_intermediate_size or config.intermediate_size
    fields["num_experts_per_tok"] = config.num_experts_per_tok
    if not config.qk_norm:
        experts = {"num_local_experts": config.num_experts, "intermediate_size": width}
        return MixtralConfig(**(fields | experts), sliding_window=window)
    return Qwen3MoeConfig(
        **fields,
        num_experts=config.num_experts,
        moe_intermediate_size=width,
        norm_topk_prob=config.norm_topk_prob,
        mlp_only_layers=list(config.mlp_only_layers or ()),
        use_sliding_window=window is not None,
        sliding_window=window,
    )


def published_name(name: str, model_type: str) -> str:
    """The name that a tensor has in the files of a model of transformers, from its name in ours."""
    if model_type == "mixtral":
        for ours, theirs in _MIXTRAL.items():
            name = name.replace(ours, theirs)
    return name


def with_our_names(tensors: Mapping[str, T], model_type: str) -> dict[str, T]:
    """The tensors of a published folder by the names that they have in ours.

    Raises:
        ValueError: the experts of a layer are one tensor.
    """
    if fused := next(
        (n for n in tensors if re.search(r"\.experts\.(gate_up|down)_proj$", n)), None
    ):
        raise ValueError(
            f"{fused} holds all experts of a layer: write the model by transformers' save_pretrained as it "
            "is published, with tensors for each expert (save_original_format=True, its default)"
        )
    if model_type != "mixtral":
        return dict(tensors)
    found = {}
    for name, tensor in tensors.items():
        for ours, theirs in _MIXTRAL.items():
            name = name.replace(theirs, ours)
        found[name] = tensor
    return found


def fused(makes: Makes) -> Makes:
    """Weights as transformers' models hold them in memory: of a layer's experts two tensors.

    Args:
        makes: for each of our names, a function that makes the tensor.

    Returns:
        The same with `mlp.experts.gate_up_proj`, [experts, 2 width, hidden], and `mlp.experts.down_proj`,
        [experts, hidden, width], in place of each expert's.
    """
    found: dict[str, Callable[[], Tensor]] = {}
    of_experts: dict[str, dict[int, dict[str, Callable[[], Tensor]]]] = {}
    for name, make in makes.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            experts, number, which = match.groups()
            of_experts.setdefault(experts, {}).setdefault(int(number), {})[which] = make
        else:
            found[name] = make

    for experts, parts in of_experts.items():
        ordered = [parts[number] for number in sorted(parts)]
        for name, joined in (
            ("gate_up_proj", ("gate_proj", "up_proj")),
            ("down_proj", ("down_proj",)),
        ):
            found[f"{experts}.{name}"] = partial(_stack, ordered, joined)
    return found


def _stack(experts: list[dict[str, Callable[[], Tensor]]], joined: tuple[str, ...]) -> Tensor:
    return torch.stack([torch.cat([one[name]() for name in joined]) for one in experts])
