"""megatron-core's engines with experts give the tokens that plain PyTorch gives, over tensor-parallel ranks
and pipeline stages; and a ladder layer's sums are under way while what comes next computes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.fields.experts import ExpertsConfig
from megatron_ladder.inference.cache import widest
from megatron_ladder.inference.experts import ranks_of_experts, without_capacity
from pretrain.config.presets import PRESETS
from pretrain.run.checkpoint import load_weights
from tests.distributed.test_inference import (
    NEW,
    build,
    generate,
    overlap_of_decode,
    prompts,
)
from tests.distributed.test_parity import LOGITS_TOLERANCE, VOCAB, save_model
from tests.expert_oracle import Cut, Oracle
from tests.ranks import run_ranks

EXPERTS = ExpertsConfig(num_moe_experts=4, moe_ffn_hidden_size=24)
SHARED = replace(EXPERTS, moe_shared_expert_intermediate_size=16)
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    vocab_size=VOCAB,
    max_position_embeddings=64,
    share_embeddings_and_output_weights=True,
    residual="ladder",
    experts=SHARED,
)
KINDS = {
    "ladder, a shared expert, some MLPs": replace(
        MODEL, experts=replace(SHARED, moe_layer_freq=(1, 0, 1, 1))
    ),
    "ladder": replace(MODEL, experts=EXPERTS),
    "standard, a shared expert": replace(MODEL, residual="standard"),
    "hybrid, expert bias": replace(
        MODEL,
        ladder_layers=2,
        experts=replace(
            SHARED, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True
        ),
    ),
    "parallel": replace(MODEL, residual="parallel"),
    "parallel-ladder, some MLPs": replace(
        MODEL, residual="parallel-ladder", experts=replace(SHARED, moe_layer_freq=(1, 0, 1, 1))
    ),
    "six experts": replace(MODEL, experts=replace(EXPERTS, num_moe_experts=6)),
    "three experts": replace(MODEL, experts=replace(SHARED, num_moe_experts=3)),
}
SOME = [
    ("ladder, a shared expert, some MLPs", [(1, 1), (2, 1)]),
    ("standard, a shared expert", [(2, 1)]),
]
ALL = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]


def save_weights(model: ModelConfig, folder: Path) -> None:
    """Large enough that the tokens vary."""
    gpt = build(model, 1, 1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=draw)
            else:
                parameter.normal_(std=0.3, generator=draw)
        for name, buffer in gpt.named_buffers():
            if name.endswith("expert_bias"):
                buffer.uniform_(-0.5, 0.5, generator=draw)
    save_model(gpt, folder)


@torch.no_grad()
def expected_tokens(model: ModelConfig, folder: Path) -> list[list[int]]:
    """By plain PyTorch, without a cache."""
    oracle = Oracle(replace(PRESETS["debug"](), model=model), load_weights(folder))
    found, lead = [], float("inf")
    for prompt in prompts():
        ids = list(prompt)
        for _ in range(NEW):
            logits, _ = oracle.logits(torch.tensor([ids]), Cut(1))
            best = logits[0, -1, :VOCAB].topk(2)
            lead = min(lead, float(best.values[0] - best.values[1]))
            ids.append(int(best.indices[0]))
        found.append(ids[len(prompt) :])
    assert lead > 2 * LOGITS_TOLERANCE, "a near-tie, which rounding decides: draw other weights"
    assert all(len(set(tokens)) > 5 for tokens in found), "repeating itself proves little"
    return found


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        *(pytest.param(kind, layouts, id=kind) for kind, layouts in SOME),
        *(pytest.param(kind, ALL, id=f"{kind}-all", marks=pytest.mark.slow) for kind in KINDS),
    ],
)
def test_engines_give_the_tokens_of_plain_pytorch(
    kind: str, layouts: list[tuple[int, int]], tmp_path: Path
) -> None:
    model, folder = KINDS[kind], tmp_path / "weights"
    run_ranks(1, save_weights, model, folder, tmp_path=tmp_path)
    expected = expected_tokens(model, folder)
    for tp, pp in layouts:
        for static, dynamic in run_ranks(
            tp * pp, generate, model, tp, pp, folder, tmp_path=tmp_path
        ):
            assert static == expected, (tp, pp)
            assert dynamic == expected, (tp, pp)


def test_sums_of_experts_are_under_way_while_what_comes_next_computes(tmp_path: Path) -> None:
    """A ladder layer's; a standard one waits at once."""
    model, folder = replace(MODEL, ladder_layers=2), tmp_path / "weights"
    run_ranks(1, save_weights, model, folder, tmp_path=tmp_path)
    for events in run_ranks(2, overlap_of_decode, model, folder, tmp_path=tmp_path):
        for layer in (1, 2, 3):
            following = layer + 1
            begin, end = (
                events.index((what, f"attention {following}")) for what in ("begin", "end")
            )
            start, wait = (events.index((what, f"mlp {layer}")) for what in ("start", "wait"))
            if model.layer_residuals()[following - 1] == "ladder":
                assert start < begin < end < wait, layer
            else:
                assert start < wait < begin, layer


def test_experts_are_on_as_many_ranks_as_can_be() -> None:
    for experts, tp, ranks in ((8, 2, 2), (8, 8, 8), (4, 8, 4), (6, 4, 2), (3, 2, 1)):
        model = replace(MODEL, experts=replace(EXPERTS, num_moe_experts=experts))
        assert ranks_of_experts(model, ParallelConfig(tensor_model_parallel_size=tp)) == ranks
    dense = replace(MODEL, experts=ExpertsConfig())
    assert ranks_of_experts(dense, ParallelConfig(tensor_model_parallel_size=2)) == 1


def test_the_width_of_experts_is_of_all_choices() -> None:
    assert widest(32, 64, ExpertsConfig()) == 64 and widest(32, 64, ExpertsConfig(), 2) == 32
    # Two choices, each 24 wide with two copies of 32; four scores; on each of two ranks half of 16.
    assert widest(32, 64, SHARED) == 2 * (24 + 16) + 16 + 4
    assert widest(32, 64, SHARED, 2) == 2 * (24 + 16) + 8 + 4
    assert widest(32, 600, SHARED) == 600


def test_an_engine_drops_no_token() -> None:
    limited = replace(
        EXPERTS, moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True
    )
    assert without_capacity(replace(MODEL, experts=limited)).experts == EXPERTS
    assert without_capacity(MODEL) == MODEL
