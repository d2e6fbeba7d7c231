"""Ladder Residual transformers on megatron-core."""

from megatron_ladder.one_cudnn import load_torchs

load_torchs()  # first, because the package imports megatron-core, which imports Transformer Engine
