"""Translates a training configuration to the configuration of the exported model."""

from megatron_ladder.config import ModelConfig
from megatron_ladder.hf.configuration_ladder import LadderConfig


def to_hf_config(model: ModelConfig, eod_id: int | None = None) -> LadderConfig:
    """Translates a training configuration to Hugging Face's fields.

    Args:
        model: with `vocab_size` set.
        eod_id: the id of the token that ends a document. Generation stops at it.
    """
    assert model.vocab_size is not None
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": model.rotary_base}
    if model.rope_scaling_factor is not None and model.rope_scaling_type == "linear":
        rope |= {"rope_type": "linear", "factor": model.rope_scaling_factor}
    elif model.rope_scaling_factor is not None:
        # In megatron-core only the factor of Llama 3's scaling can be set. The other numbers are constants.
        rope |= {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    layers = model.ladder_layers
    return LadderConfig(
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
        rope_parameters=rope,
        residual=model.residual,
        ladder_layers=list(layers) if isinstance(layers, tuple) else layers,
        initializer_range=model.init_method_std,
        tie_word_embeddings=model.share_embeddings_and_output_weights,
        eos_token_id=eod_id,
    )
