"""The model of generation's time: by hand, and against the paper's rates that it was made from."""

from dataclasses import replace

import pytest

from measuring.inference.plan import (
    KERNEL_S,
    NEW_TOKENS,
    PHASES,
    SHAPES,
    Pass,
    Shape,
    alternatives,
    generation_seconds,
    head_seconds,
    modelled_pass,
    submodule_seconds,
)
from megatron_ladder.config import ModelConfig

MEMORY = 0.91 * 3.35e12  # bytes a second
MATH = 0.65 * 989e12
SMALL = ModelConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2
)


def rate(tp: int, batch: int, kind: str) -> float:
    """Tokens a second of 70B over NVSwitch."""
    shape = replace(SHAPES["70b"], tp=tp)
    passes = (modelled_pass(shape, phase, batch=batch, link="nvswitch") for phase in PHASES)
    seconds = (made.seconds(kind) for made in passes)
    return batch * NEW_TOKENS / generation_seconds(shape, batch, *seconds)


def test_its_two_constants_give_the_papers_no_comm_rates() -> None:
    for tp, published in ((2, 38.24), (4, 69.04), (8, 110.59)):
        assert rate(tp, 1, "no-comm") == pytest.approx(published, rel=0.03)


def test_and_the_rate_of_standard_which_they_were_not_made_from() -> None:
    assert rate(8, 1, "standard") == pytest.approx(77.39, rel=0.05)


def test_decode_reads_weights_and_cache_from_memory() -> None:
    def parts(**changed) -> tuple[float, float]:
        given = {"batch": 1, "new": 1, "context": 1000, "tp": 2} | changed
        return submodule_seconds(SMALL, **given)

    attention, mlp = parts()
    # 2 bytes: up, gate and down of 64 x 96 and what they read and write, on two ranks; the norm's 2,
    # SwiGLU's 3 and the addition's 3 numbers an element.
    numbers = 3 * 64 * 96 / 2 + (64 + 96) + (64 + 48) + 2 * 64 + 3 * 48 + 3 * 64
    assert mlp == pytest.approx(2 * numbers / MEMORY + 5 * KERNEL_S)
    # Keys and values of two groups of 16, a token each.
    token = 2 * (2 * 32 / 2) / MEMORY
    assert parts(context=3000)[0] - attention == pytest.approx(2000 * token)
    assert parts(cache_reads=9)[0] - attention == pytest.approx(8 * 1000 * token)
    assert parts(context=3000)[1] == mlp


def test_prefill_computes() -> None:
    shape = SHAPES["70b"]
    one, two = (
        submodule_seconds(shape.model, batch=batch, new=1024, context=1024, tp=8)[1]
        for batch in (16, 32)
    )
    gemms = 2 * 16 * 1024 * 3 * 8192 * 28672 / 8 / MATH
    others = 2 * 16 * 1024 * (5 * 8192 + 3 * 28672 / 8) / MEMORY
    assert two - one == pytest.approx(gemms + others)


def test_parallel_wins_when_one_all_reduce_outlasts_a_layers_compute() -> None:
    for link_s, ladder_wins in ((0.5, True), (2.9, True), (3.1, False), (6.0, False)):
        made = Pass(
            attention_s=1.0, mlp_s=2.0, all_reduce_s=link_s, half_all_reduce_s=0.0, num_layers=1000
        )
        assert (made.seconds("ladder") < made.seconds("parallel")) == ladder_wins
        assert made.hidden_share("standard") == 0 and made.hidden_share("no-comm") == 1
    made = Pass(attention_s=1.0, mlp_s=2.0, all_reduce_s=0.5, half_all_reduce_s=0.3, num_layers=10)
    assert made.seconds("standard") == pytest.approx(30 + 20 * 0.5)
    assert made.hidden_share("parallel") == pytest.approx(0.5)
    assert made.hidden_share("ladder") == pytest.approx(1 - 1 / 20)


def test_a_generation_is_its_passes_and_heads() -> None:
    shape = Shape(replace(SMALL, vocab_size=1024), 2)
    head = 2 * 64 * 512 / MEMORY + KERNEL_S
    assert head_seconds(shape, 1) == pytest.approx(head)
    assert generation_seconds(shape, 1, 3.0, 0.01) == pytest.approx(3.0 + 511 * 0.01 + 512 * head)


def test_alternatives_by_hand() -> None:
    # Llama 3 8B with P2P off, decode: the link is the longer of the two resources.
    shape, batch = SHAPES["8b"], 64
    made = modelled_pass(shape, "decode", batch=batch, link="p2p-off")
    layer = made.attention_s + made.mlp_s
    message = 2 * batch * 4096 / 37e9
    assert made.all_reduce_s == pytest.approx(65e-6 + message)
    assert made.all_reduce_s > layer > 0.8 * made.all_reduce_s
    found = alternatives(shape, "decode", batch=batch, link="p2p-off")
    a, m, n = made.attention_s, made.mlp_s, made.num_layers
    # The first attention, then the link without a pause.
    assert made.seconds("ladder") == pytest.approx(a + 2 * n * made.all_reduce_s)
    quantised = a + 2 * KERNEL_S + 2 * n * (65e-6 + message / 2)
    assert found["ladder, 8-bit sums"] == pytest.approx(quantised)
    in_parts = a + 2 * n * (2 * 65e-6 + message)
    assert found["ladder, in two parts"] == pytest.approx(in_parts)
    halves = submodule_seconds(shape.model, batch=batch // 2, new=1, context=1280, tp=8)
    half_link = 65e-6 + message / 2
    assert found["parallel, half-batches"] == pytest.approx(n * max(2 * sum(halves), 2 * half_link))
    assert found["standard, half-batches"] == pytest.approx(4 * n * (65e-6 + message / 2))
    assert found["parallel, one layer stale"] == pytest.approx(n * made.all_reduce_s)
    assert m < made.all_reduce_s
    # Over NVSwitch compute is the longer: half-batches read all weights twice.
    halves = alternatives(SHAPES["70b"], "decode", batch=4, link="nvswitch")[
        "standard, half-batches"
    ]
    made = modelled_pass(SHAPES["70b"], "decode", batch=4, link="nvswitch")
    assert halves > 1.8 * made.seconds("no-comm")
    assert "standard, half-batches" not in alternatives(
        SHAPES["70b"], "decode", batch=1, link="nvswitch"
    )
