"""Translates the config.json of a Hugging Face folder to a training configuration."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

import megatron_ladder.hf  # noqa: F401 (registers "ladder" and "ladder-side" with transformers)
from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.hf.fields import check_fields
from megatron_ladder.hf.model_config import (
    FULL,
    SLIDING,
    experts_fields,
    rope_fields,
    window_fields,
)
from megatron_ladder.hf.modelling.modeling_side import LadderSideConfig
from megatron_ladder.json_files import in_words, named, read_json, short
from megatron_ladder.rope import LLAMA3_HIGH, LLAMA3_LOW

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
    "LadderForCausalLM",
    "LadderSideForCausalLM",
)
MODEL_TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"),
    *("ladder", "ladder-side"),
)
# All Llama 3 models have these numbers.
LLAMA3 = {"low_freq_factor": LLAMA3_LOW, "high_freq_factor": LLAMA3_HIGH}
# The models whose layers may have a window or not. The others' layers are all the same.
WITH_TYPES = ("qwen2", "qwen3", "ladder", "ladder-side")
# Each key that a type of RoPE must have, beside its own of LLAMA3, and those that it may have.
ROPE_NUMBERS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
    ),
}


def read_hf_config(folder: Path) -> Any:
    """Reads transformers' configuration of a model in a local folder. No code of the folder is run.

    Args:
        folder: contains config.json.

    Returns:
        A configuration object of transformers.

    Raises:
        UserError: there is no config.json, it cannot be read, or its architecture is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a Hugging Face model's folder: it holds no config.json")
    values = read_json(path, "a model's configuration")
    architecture = architecture_of(values)
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path}: architecture {architecture} is not supported; these are: "
            f"{', '.join(ARCHITECTURES)}"
        )
    check_fields(values, path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises all kinds
        raise UserError(f"{path} is not a model's configuration: {in_words(error)}") from error
    if config.model_type not in MODEL_TYPES:
        raise UserError(
            f"{path}: model_type {named(str(config.model_type))} does not go with {architecture}"
        )
    return config


def refuse_side(config: Any, folder: Path, what: str) -> None:
    """Raises UserError when a folder has a side network, with which the caller cannot work.

    Args:
        config: from `read_hf_config`.
        what: the caller cannot do, and what to do instead.
    """
    if isinstance(config, LadderSideConfig):
        raise UserError(f"{folder} has a side network: {what}")


def architecture_of(values: dict[str, Any]) -> str:
    """What a config.json names first, or "none"; for comparisons and messages."""
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return "none"
    first = architectures[0]
    return named(first) if isinstance(first, str) else short(first)


def to_model_config(config: Any, where: Path) -> ModelConfig:
    """Translates a Hugging Face model's configuration to a training configuration.

    Args:
        config: from `read_hf_config`.
        where: the path that error messages name.

    Raises:
        UserError: training does not support something in the model. The message lists everything.
    """
    if (config.pad_token_id or 0) >= config.vocab_size:
        raise UserError(
            f"{where}: pad_token_id is {config.pad_token_id}, the model's ids end at "
            f"{config.vocab_size - 1}: transformers cannot load that. Set it to null"
        )
    kind = config.model_type
    wrong = _unsupported(config)
    if wrong:
        raise UserError(
            f"{where}: {'; '.join(wrong)}: supported are RMSNorm, SwiGLU, causal attention, sliding "
            "windows (Mistral, Qwen), query, key and value biases (Qwen2), query and key norms (Qwen3), "
            "experts chosen by softmax (Mixtral, Qwen3-MoE), "
            f"RoPE of type {', '.join(ROPE_NUMBERS)}"
        )
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    layers = getattr(config, "ladder_layers", None)
    return ModelConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=hidden,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=None if head_dim * heads == hidden else head_dim,
        add_qkv_bias=kind == "qwen2" or getattr(config, "qkv_bias", False),
        qk_layernorm=kind in ("qwen3", "qwen3_moe") or getattr(config, "qk_norm", False),
        vocab_size=config.vocab_size,
        residual=getattr(config, "residual", "standard"),
        ladder_layers=tuple(layers) if isinstance(layers, list) else layers,
        residual_scaling=getattr(config, "residual_scaling", "none"),
        layer_norms=getattr(config, "layer_norms", True),
        max_position_embeddings=config.max_position_embeddings,
        **window_fields(_window(config), _layer_types(config)),
        **rope_fields(config.rope_parameters or {}),
        layernorm_epsilon=config.rms_norm_eps,
        init_method_std=config.initializer_range,
        share_embeddings_and_output_weights=bool(config.tie_word_embeddings),
        experts=experts_fields(config),
    )


def _unsupported(config: Any) -> list[str]:
    found = []
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        found.append(f"hidden_act is {named(str(config.hidden_act))}")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            found.append(f"{name} is set")
    if (experts := getattr(config, "num_experts", None)) is not None:
        chosen = config.num_experts_per_tok
        softmax = getattr(config, "scoring_func", "softmax") == "softmax"
        if not 1 <= chosen <= experts or experts < 2:
            found.append(f"num_experts_per_tok is {chosen}, of {experts} experts")
        elif chosen == 1 and softmax and getattr(config, "norm_topk_prob", True):
            found.append("num_experts_per_tok is 1, whose weight would always be 1")
    if getattr(config, "router_jitter_noise", 0):
        found.append(f"router_jitter_noise is {short(config.router_jitter_noise)}")
    if getattr(config, "quantization_config", None):
        found.append("its weights are quantized")
    types = set(getattr(config, "layer_types", None) or ())
    window = _window(config)
    if config.model_type == "llama" and window is not None:
        found.append(f"sliding_window is {window}, which Llama does not have")
    if types - ({FULL, SLIDING} if config.model_type in WITH_TYPES else {FULL}):
        found.append(f"layer_types has {', '.join(named(t) for t in sorted(types))}")
    rope = dict(config.rope_parameters or {})
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ROPE_NUMBERS:
        found.append(f"rope_type is {named(str(rope_type))}")
    if rope_type == "llama3":
        found += [
            f"{k} is {short(rope.get(k))}, not {v}" for k, v in LLAMA3.items() if rope.get(k) != v
        ]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        found.append(f"partial_rotary_factor is {short(rope['partial_rotary_factor'])}")
    if not rope.get("truncate", True):
        found.append("truncate is false")
    required, optional = ROPE_NUMBERS.get(str(rope_type), ((), ()))
    for name in ("rope_theta", *required, *optional):
        absent = 1.0 if name == "rope_theta" else None
        value = rope.get(name, absent)
        if type(value) not in (int, float) and not (value is None and name in optional):
            found.append(f"{name} is {short(value)}")
    return found


def _layer_types(config: Any) -> list[str]:
    """Of each layer. Models that are not of WITH_TYPES give every layer the window, whatever they list."""
    types = getattr(config, "layer_types", None)
    if types and config.model_type in WITH_TYPES:
        return types
    return [SLIDING] * config.num_hidden_layers


def _window(config: Any) -> int | None:
    """The window, unless it is as long as the context: then it changes nothing."""
    # Mistral's window is on unless it is null. Qwen's has a switch, which transformers has already applied.
    window = getattr(config, "sliding_window", None)
    return window if window is not None and window < config.max_position_embeddings else None
