"""Ladder layers for Megatron-LM's own training script:

    python pretrain_gpt.py --spec megatron_ladder.megatron_lm ladder_layer_spec ...

Megatron-LM uses the named object without calling it. So `ladder_layer_spec` is a ModuleSpec, which is made
when this module is imported. Every layer is a ladder layer. docs/design/architecture.md lists the options
of Megatron-LM that it supports.
"""

from megatron_ladder.specs import layer_spec

ladder_layer_spec = layer_spec(residuals=None)
