"""The spec that Megatron-LM's `--spec MODULE NAME` takes."""

import pytest
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

from megatron_ladder.specs import layer_spec
from tests.ranks import run_ranks


def test_megatron_lm_finds_a_spec_it_can_build_a_block_from() -> None:
    spec = import_module(["megatron_ladder.megatron_lm", "ladder_layer_spec"])
    assert isinstance(spec, ModuleSpec)
    assert issubclass(spec.module, BaseTransformerLayer)


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ({"add_bias_linear": True}, "biases"),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
            r"recompute_modules \['mlp'\]",
        ),
        ({"qk_layernorm": True}, "norms of queries and keys"),
        ({"normalization": "LayerNorm"}, "normalization LayerNorm"),
        ({"num_moe_experts": 4}, "mixture of experts"),
    ],
)
def test_options_of_megatron_lm_that_would_be_ignored_are_refused(option, name, tmp_path) -> None:
    with pytest.raises(AssertionError, match=f"layers do not support {name}"):
        run_ranks(1, build_block, option, tmp_path=tmp_path)


def build_block(option: dict) -> None:
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    common = {"add_bias_linear": False, "use_cpu_initialization": True, "normalization": "RMSNorm"}
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        **(common | option),
    )
    TransformerBlock(config, layer_spec(None, "local"))


def test_a_megatron_lm_block_of_ladder_layers_builds(tmp_path) -> None:
    run_ranks(1, build_block, {}, tmp_path=tmp_path)
