"""A long prompt is read in chunks, one a step: tokens and logits are those of prompts that are read whole.

Meanwhile other requests decode, and a request whose prompt is being read can be cancelled.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_ladder.config import ModelConfig
from megatron_ladder.inference.engine import DynamicEngine, generate_static
from megatron_ladder.inference.requests import Request, Sampling
from tests.distributed.test_inference import NO_EOD, finish, load, save_weights, tiny
from tests.distributed.test_parity import LOGITS_TOLERANCE, VOCAB
from tests.ranks import run_ranks

CONTEXT, NEW = 256, 10
STEP = 64
"""Tokens of a step: megatron-core rounds up to a multiple of it."""
LENGTHS = (200, 65, 9, 130, 64)
"""Of prompts. 65: a chunk of 64 would leave one token."""
KINDS_AND_LAYOUTS = [
    pytest.param("ladder", [(1, 1), (2, 1), (1, 2)], id="ladder"),
    pytest.param("standard", [(2, 1)], id="standard"),
    pytest.param("parallel-ladder", [(2, 1)], id="parallel-ladder"),
    pytest.param("ladder, windows", [(1, 1)], id="windows"),
    *(
        pytest.param(kind, [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)], id=f"{kind}-all", marks=slow)
        for kind in ("standard", "parallel", "ladder", "last-n", "parallel-ladder")
        for slow in [pytest.mark.slow]
    ),
]


def with_long_context(kind: str) -> ModelConfig:
    return replace(tiny(kind), max_position_embeddings=CONTEXT)


def request(number: int, length: int, **how: Any) -> Request:
    draw = torch.Generator().manual_seed(length)
    ids = torch.randint(3, VOCAB, (length,), generator=draw).tolist()
    return Request(number, tuple(ids), Sampling(NEW, **how))


def requests() -> list[Request]:
    return [request(i, length) for i, length in enumerate(LENGTHS)]


def start(gpt: Any, model: ModelConfig, *, prompt_tokens: int, **options: Any) -> DynamicEngine:
    return DynamicEngine(gpt, model, end_ids=[NO_EOD], prompt_tokens=prompt_tokens, **options)


def run(
    gpt: Any, model: ModelConfig, prompt_tokens: int
) -> tuple[dict[int, list[int]], dict[int, list[torch.Tensor]], int]:
    """Tokens and logits of each request, three at a time, and the number of steps."""
    engine = start(gpt, model, prompt_tokens=prompt_tokens, max_requests=3)
    context, running = engine._engine.context, engine._running
    logits: dict[int, list[torch.Tensor]] = {}
    steps = 0

    def look(_: Any, __: Any, output: torch.Tensor) -> None:
        nonlocal steps
        steps += 1
        if not parallel_state.is_pipeline_last_stage():
            return
        active = slice(context.paused_request_count, context.total_request_count)
        for row, number in enumerate(context.request_ids[active].tolist()):
            if not len(running[number][1].remaining_prompt_tokens):
                logits.setdefault(number, []).append(output[0, row].clone())

    hook = gpt.register_forward_hook(look)
    for one in requests():
        engine.add(one)
    # Its logits are changed in their own row, also while another prompt is read in part.
    engine.add(request(len(LENGTHS), 70, repetition_penalty=1.7, min_new_tokens=NEW))
    tokens = finish(engine)
    hook.remove()
    assert engine.free_blocks == 3 * CONTEXT // 16
    return tokens, logits, steps


def in_chunks_and_whole(model: ModelConfig, tp: int, pp: int, folder: Path) -> dict[int, list[int]]:
    gpt = load(model, tp, pp, folder)
    chunks, logits, steps = run(gpt, model, STEP // 2)
    whole, expected, fewer = run(gpt, model, CONTEXT)
    assert steps > fewer + 5, "no prompt was read in chunks"
    assert chunks == whole
    for number, rows in expected.items():
        assert len(rows) == NEW
        torch.testing.assert_close(logits[number], rows, atol=LOGITS_TOLERANCE, rtol=0)
    static = generate_static(gpt, model, requests(), end_ids=[NO_EOD])
    assert [chunks[i] for i in range(len(LENGTHS))] == [list(tokens) for tokens in static]
    return chunks


@pytest.mark.parametrize(("kind", "layouts"), KINDS_AND_LAYOUTS)
def test_prompts_in_chunks_give_the_tokens_and_logits_of_whole_ones(
    kind: str, layouts: list[tuple[int, int]], tmp_path: Path
) -> None:
    model = with_long_context(kind)
    folder = tmp_path / "weights"
    run_ranks(1, save_weights, model, folder, tmp_path=tmp_path)
    found = [
        tokens
        for tp, pp in layouts
        for tokens in run_ranks(
            tp * pp, in_chunks_and_whole, model, tp, pp, folder, tmp_path=tmp_path
        )
    ]
    assert all(tokens == found[0] for tokens in found)
    assert all(len(set(tokens)) > 3 for tokens in found[0].values())


def beside_others(model: ModelConfig, tp: int, folder: Path) -> None:
    """A long prompt that comes while two requests decode."""
    gpt = load(model, tp, 1, folder)
    alone = [list(t) for t in generate_static(gpt, model, requests(), end_ids=[NO_EOD])]
    long, short, other = requests()[0], requests()[2], requests()[3]
    engine = start(gpt, model, prompt_tokens=STEP // 2, max_requests=4)
    for one in (short, other):
        engine.add(one)
    tokens: dict[int, list[int]] = {}
    while len(tokens) < 2:
        for output in engine.step():
            tokens.setdefault(output.id, []).extend(output.new_ids)
    engine.add(long)
    late = replace(requests()[1], id=7)
    steps = 0
    while long.id not in tokens:
        outputs = engine.step()
        steps += 1
        assert [len(output.new_ids) for output in outputs if output.id not in (long.id, 7)] == [
            1,
            1,
        ]
        for output in outputs:
            tokens.setdefault(output.id, []).extend(output.new_ids)
        if steps == 1:
            engine.add(late)  # it waits until the long prompt has been read
            assert (engine.num_running, engine.num_waiting) == (3, 1)
        elif long.id not in tokens and engine._running[long.id][1].finished_chunk_token_count < 150:
            assert engine.num_waiting == 1
    assert steps == 4  # 200 tokens, up to 62 in a step: two tokens are those of the others
    for number, new in finish(engine).items():
        tokens.setdefault(number, []).extend(new)
    assert tokens == {0: alone[0], 2: alone[2], 3: alone[3], 7: alone[1]}


def cancelled(model: ModelConfig, tp: int, folder: Path) -> None:
    """Requests that are cancelled while their prompts are read: none of the cache stays taken."""
    gpt = load(model, tp, 1, folder)
    alone = [list(t) for t in generate_static(gpt, model, requests(), end_ids=[NO_EOD])]
    long, short = requests()[0], requests()[2]
    engine = start(
        gpt, model, prompt_tokens=STEP // 2, max_requests=3, cache_tokens=2 * CONTEXT + 16
    )
    whole = engine.free_blocks
    tokens: dict[int, list[int]] = {}
    for number in range(10, 22):  # together they would need the cache several times
        engine.add(replace(short, id=number))
        engine.add(replace(long, id=100 + number))
        engine.add(replace(requests()[1], id=200 + number))  # behind it
        for _ in range(1 + number % 4):
            for output in engine.step():
                tokens.setdefault(output.id, []).extend(output.new_ids)
        reading = engine._running[100 + number][1].remaining_prompt_tokens
        assert len(reading) or number % 4 == 3
        engine.cancel(100 + number)
        engine.cancel(200 + number)
        more = engine.step()
        assert {output.id for output in more} == {number}
        assert set(engine._running) == {number}
        for output in more:
            tokens[number].extend(output.new_ids)
        for ended, new in finish(engine).items():
            tokens[ended].extend(new)
        assert tokens[number] == alone[2]
        assert engine.free_blocks == whole
        assert engine._engine.context.chunked_prefill_request_id == -1
        assert not engine._engine.waiting_request_ids
    for one in requests():
        engine.add(one)
    assert finish(engine) == dict(enumerate(alone))


def beside_and_cancelled(model: ModelConfig, tp: int, folder: Path) -> None:
    beside_others(model, tp, folder)
    cancelled(model, tp, folder)


@pytest.mark.parametrize("tp", [1, 2])
def test_requests_beside_a_long_prompt_and_those_that_are_cancelled(
    tp: int, tmp_path: Path
) -> None:
    model = with_long_context("ladder")
    folder = tmp_path / "weights"
    run_ranks(1, save_weights, model, folder, tmp_path=tmp_path)
    run_ranks(tp, beside_and_cancelled, model, tp, folder, tmp_path=tmp_path)
