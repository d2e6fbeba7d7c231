"""The spec that Megatron-LM's `--spec MODULE NAME` takes."""

from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.transformer_layer import BaseTransformerLayer


def test_megatron_lm_finds_a_spec_it_can_build_a_block_from() -> None:
    spec = import_module(["megatron_ladder.megatron_lm", "ladder_layer_spec"])
    assert isinstance(spec, ModuleSpec)
    assert issubclass(spec.module, BaseTransformerLayer)
