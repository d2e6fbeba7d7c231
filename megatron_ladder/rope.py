"""Rotary position embeddings (RoPE, arXiv 2104.09864) of all scalings, in one place for every version.

megatron-core has them too, but its YaRN scales cosines and sines. Transformer Engine's kernel cannot do
that, and megatron-core's own inference engine does it to the keys alone (0.16). So the frequencies are made
here, and what YaRN multiplies queries and keys by becomes part of the softmax's scale.
"""

import math

import torch
from torch import Tensor

from megatron_ladder.config import ModelConfig

LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
"""Turns in the original context: fewer are stretched by the whole factor, more are not stretched."""


LLAMA3_CONTEXT = 8192


def yarn_attention_factor(factor: float, mscale: float = 1) -> float:
    """What YaRN multiplies queries and keys by (section 3.4), for a context `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1


def original_context(model: ModelConfig) -> int:
    """The context before RoPE was stretched, in tokens: `rope_original_max_position_embeddings`."""
    if model.rope_original_max_position_embeddings is not None:
        return model.rope_original_max_position_embeddings
    if model.rope_scaling_type == "yarn":
        assert model.rope_scaling_factor is not None
        return max(1, round(model.max_position_embeddings / model.rope_scaling_factor))
    return LLAMA3_CONTEXT


def frequencies(model: ModelConfig) -> Tensor:
    """The angle per position, in radians, of each pair of channels: fp32 [head_dim / 2], on the CPU."""
    dim, base, factor = model.head_dim, model.rotary_base, model.rope_scaling_factor
    wavelengths = base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    plain = 1.0 / wavelengths
    if factor is None:
        return plain
    if model.rope_scaling_type == "linear":
        return plain / factor
    if model.rope_scaling_type == "llama3":
        turns = original_context(model) * plain / (2 * math.pi)
        kept = ((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)).clamp(0, 1)
        return (1 - kept) * plain / factor + kept * plain
    # YaRN, section 3.2 ("NTK-by-parts"): the share that is stretched grows with the pair's number.
    first = max(math.floor(_pair_with_turns(model, model.rope_beta_fast)), 0)
    last = min(math.ceil(_pair_with_turns(model, model.rope_beta_slow)), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    stretched = ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
    return stretched / (factor * wavelengths) + (1 - stretched) * plain


def _pair_with_turns(model: ModelConfig, turns: float) -> float:
    """The number of the pair of channels that makes so many turns within the original context."""
    wavelength = original_context(model) / (2 * math.pi * turns)
    return model.head_dim * math.log(wavelength) / (2 * math.log(model.rotary_base))


def softmax_scale(model: ModelConfig) -> float | None:
    """What scores are multiplied by before the softmax. None: the usual 1 / sqrt(head_dim).

    YaRN (section 3.4) multiplies queries and keys by `rope_attention_factor`, so scores by its square.
    """
    factor = model.rope_attention_factor
    if model.rope_scaling_type == "yarn" and factor is None:
        assert model.rope_scaling_factor is not None
        factor = yarn_attention_factor(model.rope_scaling_factor)
    return None if factor in (None, 1) else factor**2 / math.sqrt(model.head_dim)
