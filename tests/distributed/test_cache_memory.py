"""The key-value cache fits the memory that there is; what can never fit is refused, the rest waits."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ladder.errors import UserError
from megatron_ladder.inference import cache
from megatron_ladder.inference.cache import Part, in_bytes, plan_cache
from megatron_ladder.inference.engine import DynamicEngine, generate_static
from megatron_ladder.inference.requests import Request, Sampling
from tests.distributed.test_inference import NO_EOD, build, finish, requests, tiny
from tests.ranks import run_ranks

MODEL = replace(tiny("ladder"), max_position_embeddings=256)
TOKEN_BYTES = 4 * 2 * 4 * 4 * 4  # fp32: keys and values of 4 layers, 4 heads, 4 channels
STEP = {"step_tokens": 64, "requests": 4}


def plan(gpt: Any, **options: Any) -> cache.Cache:
    return plan_cache(
        gpt, MODEL, **STEP, **{"useful_tokens": 4 * 256, "cache_tokens": None} | options
    )


def with_memory(free: int) -> None:
    """The free memory of this machine, of which ranks use nine tenths."""
    cache.memory_here = lambda: math.ceil(free / 0.9) + 1  # type: ignore[assignment]


def needed(gpt: Any, tokens: int) -> int:
    """By the parts that are tested by hand below; one more block is the engine's."""
    part = Part.of_rank(gpt, MODEL)
    tokens += 16
    copies = part.copy_bytes(64, 4, min(256, tokens))
    return tokens * TOKEN_BYTES + part.pass_bytes(64, 4) + copies


def plans() -> None:
    gpt = build(MODEL, 1, 1)
    part = Part.of_rank(gpt, MODEL)
    assert part.token_bytes == TOKEN_BYTES
    # States, queries and keys and values of 8 and 4 heads, the MLP's; four bytes each. Four logits rows.
    width = 6 * 32 + (3 * 8 + 4 * 4) * 4 + 4 * 64
    assert part.pass_bytes(64, 4) == 4 * 64 * width + 4 * 4 * 4 * MODEL.padded_vocab_size
    # Keys and values of a layer, copied twice, of all requests, or of one beside its mask.
    assert part.copy_bytes(1, 4, 256) == 4 * 256 * 2 * TOKEN_BYTES // 4
    assert part.copy_bytes(64, 1, 256) == 256 * 2 * TOKEN_BYTES // 4 + 5 * 64 * 256
    assert replace(part, device=torch.device("cuda")).copy_bytes(64, 4, 256) == 0

    with_memory(1 << 40)
    assert plan(gpt).tokens == 4 * 256 and not plan(gpt).is_cut
    assert plan(gpt, cache_tokens=100).tokens == 96
    assert plan(gpt, useful_tokens=90).tokens == 96
    assert plan(gpt, cache_tokens=1 << 20).tokens == 1 << 20
    for tokens in (512, 128):
        with_memory(needed(gpt, tokens))
        found = plan(gpt)
        assert (found.tokens, found.is_cut, found.longest) == (tokens, True, min(256, tokens))
        size = in_bytes(tokens * TOKEN_BYTES)
        assert f"{found}" == (
            f"The key-value cache holds {tokens} tokens: {size} on each rank, as much as the memory has "
            "room for."
        )
        with_memory(needed(gpt, tokens) - 2)
        assert plan(gpt).tokens == tokens - 16
        assert not plan(gpt, cache_tokens=tokens - 16).is_cut
        with pytest.raises(
            UserError, match=f"--cache-tokens {tokens} would take .* has room for {tokens - 16}"
        ):
            plan(gpt, cache_tokens=tokens)
    with_memory(needed(gpt, 16) - 2)
    with pytest.raises(UserError, match="no room for a key-value cache"):
        plan(gpt)
    with pytest.raises(UserError, match="no room for a key-value cache"):
        plan(gpt, cache_tokens=16)
    with pytest.raises(UserError, match="15 tokens is smaller than one block of 16"):
        plan(gpt, cache_tokens=15)


def test_the_cache_is_what_the_memory_has_room_for(tmp_path: Path) -> None:
    run_ranks(1, plans, tmp_path=tmp_path)


def refusals() -> None:
    gpt = build(MODEL, 1, 1)
    with_memory(needed(gpt, 64))
    engine = DynamicEngine(gpt, MODEL, end_ids=[NO_EOD], max_requests=4, prompt_tokens=16)
    assert engine.cache.tokens == 64
    with pytest.raises(UserError, match=r"80 new ones exceed the cache of 64 tokens: .* no room"):
        engine.check(Request(0, (5,), Sampling(80)))
    # With 24 new tokens, 5 and 12 tokens take 32 and 48: they wait for each other.
    for one in requests():
        engine.add(one)
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (1, 4)
    assert sorted(map(len, finish(engine).values())) == [23, 24, 24, 24, 24]

    with_memory(needed(gpt, 64))
    batch = requests() * 8
    with pytest.raises(UserError, match=r"batch of 40 prompts of up to 57 .* leave out --batching"):
        generate_static(gpt, MODEL, batch, end_ids=[NO_EOD])
    with_memory(1 << 40)
    generate_static(gpt, MODEL, requests(new=1), end_ids=[NO_EOD])


def test_what_can_never_fit_is_refused_and_what_does_not_fit_now_waits(tmp_path: Path) -> None:
    run_ranks(1, refusals, tmp_path=tmp_path)


def on_two_ranks() -> tuple[int, str]:
    """Ranks of one machine share its memory; the one that sees least decides."""
    gpt = build(MODEL, 2, 1)
    part = Part.of_rank(gpt, MODEL)
    assert part.token_bytes == TOKEN_BYTES // 2
    copies = part.copy_bytes(64, 4, 256)
    free = (512 + 16) * part.token_bytes + part.pass_bytes(64, 4) + copies
    with_memory(2 * free if dist.get_rank() == 0 else 20 * free)
    found = plan(gpt)
    with_memory(1 if dist.get_rank() == 1 else 1 << 40)
    with pytest.raises(UserError) as refused:
        plan(gpt)
    return found.tokens, str(refused.value)[:44]


def test_all_ranks_get_the_cache_of_the_rank_with_the_least_room(tmp_path: Path) -> None:
    sentence = "the memory has no room for a key-value cache"
    assert run_ranks(2, on_two_ranks, tmp_path=tmp_path) == [(512, sentence)] * 2
