"""Translates a training configuration to the configuration of the exported model, and parts of it back."""

import functools
from collections.abc import Sequence
from typing import Any

from megatron_ladder import rope
from megatron_ladder.config import ModelConfig
from megatron_ladder.fields.experts import ExpertsConfig
from megatron_ladder.fields.windows import layer_windows
from megatron_ladder.hf.modelling.configuration_ladder import LadderConfig
from megatron_ladder.hf.modelling.modeling_side import LadderSideConfig
from megatron_ladder.side.config import SideConfig

NO_SIDE = SideConfig()
FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of layers


def to_hf_config(
    model: ModelConfig, eod_id: int | None = None, side: SideConfig = NO_SIDE
) -> LadderConfig:
    """Translates a training configuration to Hugging Face's fields.

    Args:
        model: with `vocab_size` set.
        eod_id: the id of the token that ends a document. Generation stops at it.
        side: of the side network. With one, the result is a LadderSideConfig.
    """
    assert model.vocab_size is not None
    layers, windows = model.ladder_layers, layer_windows(model)
    kind: Any = LadderConfig
    if side.reduction is not None:
        kind = functools.partial(
            LadderSideConfig,
            side_reduction=side.reduction,
            side_layers=list(side.kept_layers(model.num_layers)),
        )
    return kind(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        qkv_bias=model.add_qkv_bias,
        qk_norm=model.qk_layernorm,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.layernorm_epsilon,
        rope_parameters=_rope_parameters(model),
        sliding_window=model.sliding_window if any(windows) else None,
        layer_types=[SLIDING if window else FULL for window in windows] if any(windows) else None,
        residual=model.residual,
        ladder_layers=list(layers) if isinstance(layers, tuple) else layers,
        residual_scaling=model.residual_scaling,
        layer_norms=model.layer_norms,
        **_experts(model),
        initializer_range=model.init_method_std,
        tie_word_embeddings=model.share_embeddings_and_output_weights,
        eos_token_id=eod_id,
    )


def _experts(model: ModelConfig) -> dict[str, Any]:
    """The exported fields of experts. What is for training alone is not among them: losses of the balance,
    and the capacity."""
    experts = model.experts
    if experts.num_moe_experts is None:
        return {}
    layers = enumerate(experts.layers(model.num_layers))
    return {
        "num_experts": experts.num_moe_experts,
        "num_experts_per_tok": experts.moe_router_topk,
        "moe_intermediate_size": experts.expert_size(model.ffn_hidden_size),
        "shared_expert_intermediate_size": experts.moe_shared_expert_intermediate_size,
        "mlp_only_layers": [i for i, has_experts in layers if not has_experts],
        "scoring_func": experts.moe_router_score_function,
        "norm_topk_prob": not experts.moe_router_pre_softmax,
        "expert_bias": experts.moe_router_enable_expert_bias,
    }


def experts_fields(config: Any) -> ExpertsConfig:
    """`ModelConfig`'s fields about experts; the default where the model has none.

    Args:
        config: transformers' configuration.
    """
    count = getattr(config, "num_experts", None)  # of Mixtral, too
    if count is None:
        return ExpertsConfig()
    step = getattr(config, "decoder_sparse_step", 1)
    without = getattr(config, "mlp_only_layers", None) or ()
    layers = range(config.num_hidden_layers)
    have = [int(i not in without and (i + 1) % step == 0) for i in layers]
    scores: Any = getattr(config, "scoring_func", "softmax")
    return ExpertsConfig(
        num_moe_experts=count,
        moe_router_topk=config.num_experts_per_tok,
        moe_ffn_hidden_size=getattr(config, "moe_intermediate_size", None),
        moe_shared_expert_intermediate_size=getattr(
            config, "shared_expert_intermediate_size", None
        ),
        moe_layer_freq=1 if all(have) else tuple(have),
        moe_router_score_function=scores,
        moe_router_pre_softmax=not getattr(config, "norm_topk_prob", True),
        moe_router_enable_expert_bias=getattr(config, "expert_bias", False),
    )


def _rope_parameters(model: ModelConfig) -> dict[str, object]:
    parameters: dict[str, object] = {"rope_type": "default", "rope_theta": model.rotary_base}
    if model.rope_scaling_factor is None:
        return parameters
    parameters |= {"rope_type": model.rope_scaling_type, "factor": model.rope_scaling_factor}
    if model.rope_scaling_type == "linear":
        return parameters
    parameters["original_max_position_embeddings"] = rope.original_context(model)
    if model.rope_scaling_type == "llama3":
        return parameters | {
            "low_freq_factor": rope.LLAMA3_LOW,
            "high_freq_factor": rope.LLAMA3_HIGH,
        }
    given = {
        "beta_fast": None if model.rope_beta_fast == 32 else model.rope_beta_fast,
        "beta_slow": None if model.rope_beta_slow == 1 else model.rope_beta_slow,
        "attention_factor": model.rope_attention_factor,
    }
    return parameters | {name: value for name, value in given.items() if value is not None}


def window_fields(window: int | None, types: Sequence[str]) -> dict[str, Any]:
    """`ModelConfig`'s fields about windows.

    Args:
        window: in tokens. None: the model has none, whatever its layers are named.
        types: of each layer, as transformers' `layer_types`.
    """
    count = len(types)
    layers = tuple(number for number, kind in enumerate(types) if kind == SLIDING)
    if window is None or not layers:
        return {}
    if len(layers) == count:
        return {"sliding_window": window}
    last = layers == tuple(range(count - len(layers), count))
    return {"sliding_window": window, "sliding_window_layers": len(layers) if last else layers}


def rope_fields(parameters: dict[str, Any]) -> dict[str, Any]:
    """`ModelConfig`'s fields about RoPE, from transformers' `rope_parameters`."""
    kind = parameters.get("rope_type", "default")
    fields: dict[str, Any] = {"rotary_base": float(parameters.get("rope_theta", 10000.0))}
    if kind == "default":
        return fields
    fields |= {"rope_scaling_factor": float(parameters["factor"]), "rope_scaling_type": kind}
    if kind == "linear":
        return fields
    original = parameters["original_max_position_embeddings"]
    if (kind, original) != ("llama3", rope.LLAMA3_CONTEXT):
        fields["rope_original_max_position_embeddings"] = original
    if kind == "llama3":
        return fields
    fields |= {
        f"rope_{name}": float(parameters[name])
        for name in ("beta_fast", "beta_slow")
        if parameters.get(name)
    }
    attention = parameters.get("attention_factor")
    if attention is None and parameters.get("mscale") and parameters.get("mscale_all_dim"):
        above, below = (
            rope.yarn_attention_factor(parameters["factor"], parameters[name])
            for name in ("mscale", "mscale_all_dim")
        )
        attention = above / below
    if attention is not None:
        fields["rope_attention_factor"] = float(attention)
    return fields


def side_fields(config: Any) -> SideConfig:
    """The side network of a folder's model; the default where it has none.

    Args:
        config: transformers' configuration.
    """
    if not isinstance(config, LadderSideConfig):
        return NO_SIDE
    dropped = tuple(i for i in range(config.num_hidden_layers) if i not in config.side_layers)
    return SideConfig(config.side_reduction, dropped or None, "fisher")
