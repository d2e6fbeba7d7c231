"""Ladder layers for Megatron-LM's own training script:

    python pretrain_gpt.py --spec megatron_ladder.megatron_lm ladder_layer_spec ...

Megatron-LM takes the named object as it is, without calling it, so it is a ModuleSpec, made when
this module is imported. Every layer is a ladder layer. docs/design/architecture.md says which of
Megatron-LM's options it supports.
"""

from megatron_ladder.specs import layer_spec

ladder_layer_spec = layer_spec(residuals=None)
