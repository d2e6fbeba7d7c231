"""Hugging Face: the modelling files of exported models, conversion of weights, export and generation.

After an import of this package transformers' Auto classes load folders of the model types "ladder" and
"ladder-side" without remote code. Of the other parts of `megatron_ladder` only `vllm` imports it.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from megatron_ladder.hf.modelling.configuration_ladder import LadderConfig
from megatron_ladder.hf.modelling.modeling_ladder import LadderForCausalLM, LadderModel
from megatron_ladder.hf.modelling.modeling_side import (
    LadderSideConfig,
    LadderSideForCausalLM,
    LadderSideModel,
)

AutoConfig.register("ladder", LadderConfig, exist_ok=True)
AutoModel.register(LadderConfig, LadderModel, exist_ok=True)
AutoModelForCausalLM.register(LadderConfig, LadderForCausalLM, exist_ok=True)
AutoConfig.register("ladder-side", LadderSideConfig, exist_ok=True)
AutoModel.register(LadderSideConfig, LadderSideModel, exist_ok=True)
AutoModelForCausalLM.register(LadderSideConfig, LadderSideForCausalLM, exist_ok=True)

__all__ = [
    "LadderConfig",
    "LadderForCausalLM",
    "LadderModel",
    "LadderSideConfig",
    "LadderSideForCausalLM",
    "LadderSideModel",
]
