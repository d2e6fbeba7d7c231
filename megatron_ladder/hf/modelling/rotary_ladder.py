# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings (RoPE, arXiv 2104.09864) of the modelling files, with their scalings.

This file is copied into the folders of exported models, beside modeling_ladder.py.
"""

import math

import torch
from torch import Tensor

from .configuration_ladder import LadderConfig


def rope_frequencies(config: LadderConfig, device: torch.device) -> tuple[Tensor, float]:
    """The angle per position, in radians, of each pair of channels: fp32 [head_dim / 2]. And what YaRN
    multiplies queries and keys by, which is 1 with other kinds."""
    rope = config.rope_parameters or {}
    base, kind, dim = rope.get("rope_theta", 1e4), rope.get("rope_type", "default"), config.head_dim
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / base ** (2 * pairs / dim)
    if kind == "default":
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / rope["factor"], 1.0
    if kind not in ("llama3", "yarn"):
        raise ValueError(f"rope_type {kind!r}: use default, linear, llama3 or yarn")
    # The turns within the original context decide. Frequencies with few turns are divided by the factor,
    # those with many do not change, and between them the change is gradual: with llama3 in the turns, with
    # YaRN (arXiv 2309.00071) in the number of the pair.
    original, attention = rope["original_max_position_embeddings"], 1.0
    if kind == "llama3":
        turns = original * frequencies / math.tau
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        many, few = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
        first = max(math.floor(dim / 2 * math.log(original / math.tau / many, base)), 0)
        last = min(math.ceil(dim / 2 * math.log(original / math.tau / few, base)), dim - 1)
        keep = 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
        attention = rope.get("attention_factor") or 0.1 * math.log(rope["factor"]) + 1
    return (1 - keep) * frequencies / rope["factor"] + keep * frequencies, attention


def rope_cos_sin(
    config: LadderConfig, position_ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE's angles, [batch, 1, length, head_dim], of `dtype`; the angles are in fp32."""
    frequencies, factor = rope_frequencies(config, position_ids.device)
    angles = position_ids[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE in Llama's convention: channel i is paired with channel i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
