"""RoPE's frequencies and scale, of training and of the exported model's code, are transformers'."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_ladder import rope
from megatron_ladder.config import ModelConfig
from megatron_ladder.hf.model_config import rope_fields, to_hf_config
from megatron_ladder.hf.modelling.rotary_ladder import rope_frequencies

QWEN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "linear": (128, {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
    "llama3, another context": (
        64,
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
        | {"high_freq_factor": 4.0, "original_max_position_embeddings": 2048},
    ),
    "yarn": (128, QWEN),
    "yarn, small": (64, QWEN | {"rope_theta": 1e4, "original_max_position_embeddings": 4096}),
    "yarn, betas": (128, QWEN | {"beta_fast": 16.0, "beta_slow": 2.0}),
    "NTK-by-parts": (128, QWEN | {"attention_factor": 1.0}),
    "yarn, mscale": (128, QWEN | {"mscale": 1.2, "mscale_all_dim": 0.7}),
    "yarn, factor 1": (128, QWEN | {"factor": 1.0}),
    "yarn, no pair between": (8, QWEN | {"original_max_position_embeddings": 6}),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_scale_are_transformers(name: str) -> None:
    dim, parameters = CASES[name]
    theirs = LlamaConfig(
        hidden_size=4 * dim,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters=dict(parameters),
    )
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, torch.device("cpu"))
    model = ModelConfig(
        num_layers=1,
        hidden_size=4 * dim,
        ffn_hidden_size=8,
        num_attention_heads=4,
        vocab_size=128,
        residual="standard",
        max_position_embeddings=131072,
        **rope_fields(parameters),
    )
    torch.testing.assert_close(rope.frequencies(model), expected, rtol=1e-6, atol=0)
    scale = rope.softmax_scale(model)
    assert (scale or dim**-0.5) == pytest.approx(factor**2 / math.sqrt(dim))
    assert (scale is None) == (factor == 1)
    exported, exported_factor = rope_frequencies(to_hf_config(model), torch.device("cpu"))
    torch.testing.assert_close(exported, expected, rtol=1e-6, atol=0)
    assert exported_factor == pytest.approx(factor)


def test_the_original_context_is_the_context_over_the_factor() -> None:
    model = ModelConfig(
        num_layers=1,
        hidden_size=64,
        ffn_hidden_size=8,
        num_attention_heads=4,
        max_position_embeddings=16384,
        rope_scaling_type="yarn",
        rope_scaling_factor=4.0,
    )
    assert rope.original_context(model) == 4096
