"""Tiny models of other projects, made with transformers, as folders."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 150
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Name: classes, and what differs from `_SHARED`.
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama, untied, llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": LLAMA3, "max_position_embeddings": 16384},
    ),
    "llama, tied, linear": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": LINEAR, "tie_word_embeddings": True},
    ),
    "llama, all heads": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 16}),
    "qwen2, untied": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2, tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3, untied": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen3, tied": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"head_dim": 8, "tie_word_embeddings": True},
    ),
    "mistral, window, yarn with mscale": (
        MistralConfig,
        MistralForCausalLM,
        {
            "head_dim": 16,
            "sliding_window": 7,
            "rope_parameters": YARN | {"mscale": 1.5, "mscale_all_dim": 0.5},
        },
    ),
    "qwen2, last layers' window, NTK-by-parts": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "rope_parameters": YARN | {"attention_factor": 1.0},
        },
    ),
    "qwen3, layer_types, yarn": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": YARN,
        },
    ),
    "llama, yarn": (
        LlamaConfig,
        LlamaForCausalLM,
        {"head_dim": 16, "rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 0.1}},
    ),
    "mixtral, window": (
        MixtralConfig,
        MixtralForCausalLM,
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "sliding_window": 7,
            "layer_types": ["full_attention"] * 4,  # transformers does not read it for this model
            "rope_parameters": YARN,
        },
    ),
    "qwen3-moe, three experts, an MLP": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3-moe, one expert of every second layer": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 24,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "tie_word_embeddings": True,
        },
    ),
}
_SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}


def make(name: str) -> Any:
    """A random fp32 model in which everything matters: no norm is ones, no bias is zero."""
    config_class, model_class, changes = MODELS[name]
    torch.manual_seed(sorted(MODELS).index(name))
    model = model_class(config_class(**(_SHARED | changes))).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.15)
    return model


def save(model: Any, folder: Path, **how: Any) -> Path:
    """As its authors would publish it, with a tokenizer."""
    model.save_pretrained(folder, **how)
    write_tokenizer(folder, VOCAB)
    return folder


def write_tokenizer(folder: Path, size: int) -> None:
    vocabulary = {f"t{i}": i for i in range(size)}
    Tokenizer(models.WordLevel(vocabulary, "t0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
