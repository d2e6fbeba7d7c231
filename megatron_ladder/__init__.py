"""Ladder Residual transformers on megatron-core."""

from megatron_ladder.cudnn_home import name_torchs

name_torchs()  # before anything of this package imports megatron-core, which imports Transformer Engine
