"""Hugging Face side: the modelling files that exported models carry, conversion, export, generation.

Importing this package lets transformers' Auto classes load "ladder" folders without remote code.
Nothing in `megatron_ladder` itself imports it.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from megatron_ladder.hf.configuration_ladder import LadderConfig
from megatron_ladder.hf.modeling_ladder import LadderForCausalLM, LadderModel

AutoConfig.register("ladder", LadderConfig, exist_ok=True)
AutoModel.register(LadderConfig, LadderModel, exist_ok=True)
AutoModelForCausalLM.register(LadderConfig, LadderForCausalLM, exist_ok=True)

__all__ = ["LadderConfig", "LadderForCausalLM", "LadderModel"]
