from dataclasses import replace

import pytest
import torch

from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.mcore_compat import LadderConfig, transformer_config
from pretrain.model.fusions import Choice, adam_class, choices, over_context_ranks, table


def config_of(**changed: object) -> LadderConfig:
    model = ModelConfig(
        num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, vocab_size=64
    )
    config = transformer_config(model, ParallelConfig(), precision="bf16")
    for name, value in changed.items():
        setattr(config, name, value)
    return config


ON_GPU = {
    "bias_activation_fusion": True,
    "bias_dropout_fusion": True,
    "cross_entropy_loss_fusion": True,
}
TE = type("FusedAdam", (), {"__module__": "transformer_engine.pytorch.optimizers.fused_adam"})


def by_part(config: LadderConfig, adam: type) -> dict[str, Choice]:
    return {choice.part: choice for choice in choices(config, adam)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_a_cpu_every_part_but_attention_has_its_reason() -> None:
    found = by_part(config_of(), adam_class())
    assert [part for part, choice in found.items() if not choice.why] == ["attention"]
    assert found["attention"].implementation == "torch: flash attention"
    assert found["weight gradients"].why == "no GPU"
    assert found["Adam"].implementation == "torch's AdamW, its fused kernel"


def test_all_there() -> None:
    config = config_of(
        **ON_GPU,
        transformer_impl="transformer_engine",
        gradient_accumulation_fusion=True,
        fp8="hybrid",
        fp8_recipe="delayed",
    )
    found = by_part(config, TE)
    assert not any(choice.why for choice in found.values())
    assert found["precision of linears"].implementation == "FP8 hybrid, recipe delayed"
    assert "(" not in table(list(found.values()))


def test_what_is_missing_alone_is_said() -> None:
    config = config_of(**ON_GPU, transformer_impl="transformer_engine")
    lacking = {c.part: c for c in choices(config, TE) if c.cost}
    assert list(lacking) == ["weight gradients"]
    assert "apex" in lacking["weight gradients"].why
    deterministic = config_of(**(ON_GPU | {"cross_entropy_loss_fusion": False}))
    assert by_part(deterministic, TE)["cross entropy"].why == "deterministic"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch has another kernel on a GPU")
def test_attention_with_scores_in_memory_says_why_and_what_it_costs() -> None:
    model = ModelConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        vocab_size=64,
        attention_dropout=0.1,
    )
    for attention, whose, why in (
        ("auto", "torch", "no other kernel for float32, 16 channels a head, attention dropout"),
        ("unfused", "megatron-core", "attention is unfused"),
    ):
        config = transformer_config(model, ParallelConfig(), impl="local", attention=attention)
        assert config.core_attention.keeps_scores
        found = by_part(config, adam_class())["attention"]
        assert found.implementation == f"{whose}: scores in memory"
        assert why in found.why
        assert "s x s scores" in found.cost
    assert not config_of().core_attention.keeps_scores


def test_one_line_a_part() -> None:
    found = choices(config_of(), adam_class())
    lines = table(found).splitlines()
    assert len(lines) == len(found)
    for choice, line in zip(found, lines, strict=True):
        assert (f"({choice.why}" in line) == bool(choice.why)


@pytest.mark.parametrize(
    ("whose", "comm", "implementation", "why"),
    [
        ("te", "p2p", "Transformer Engine: keys and values go around a ring", ""),
        ("te", "all_gather", "Transformer Engine: keys and values are gathered", "its ring has no"),
        ("torch", "all_gather", "keys and values are gathered", "is not Transformer Engine's"),
    ],
)
def test_how_keys_reach_other_ranks(whose: str, comm: str, implementation: str, why: str) -> None:
    config = config_of(context_parallel_size=2, cp_comm_type=comm)
    config.core_attention = replace(config.core_attention, whose=whose)
    [choice] = over_context_ranks(config)
    assert choice.implementation == implementation
    assert why in choice.why
    assert bool(choice.cost) == bool(choice.why)
