"""How tokens are chosen, and where a text ends: the engine's tokens are transformers'."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TopKLogitsWarper, TopPLogitsWarper

from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.hf.export import export_folder
from megatron_ladder.hf.model_config import to_hf_config
from megatron_ladder.inference.engine import DynamicEngine, generate_static
from megatron_ladder.inference.logits import keep_likeliest
from megatron_ladder.inference.requests import Request, Sampling
from pretrain.run.checkpoint import load_weights
from tests.distributed.test_inference import NEW, finish, load, prompts, save_weights, tiny
from tests.distributed.test_parity import VOCAB
from tests.ranks import run_ranks
from tests.unit.hf.tiny import train_sentencepiece

Ends = tuple[int, ...]


def choices(plain: list[list[int]]) -> list[tuple[Ends, Sampling]]:
    """The model's end tokens and how to choose; one for each prompt, all in one batch."""
    common = plain[0][3], plain[1][9], plain[2][0]
    return [
        (common, Sampling(NEW)),
        (common, Sampling(NEW, min_new_tokens=12)),
        (common, Sampling(NEW, ignore_end=True, repetition_penalty=1.7)),
        (common, Sampling(NEW, stop_ids=(plain[3][5],))),
        (common, Sampling(NEW, repetition_penalty=0.6, min_new_tokens=3, top_k=1, temperature=9)),
    ]


def expected(model: ModelConfig, weights: Path, folder: Path) -> tuple[list, list]:
    """Without ends, and with `choices`, by transformers."""
    config = to_hf_config(model, eod_id=2)
    tokenizer = train_sentencepiece(weights.parent, "bpe")
    export_folder(load_weights(weights), config, tokenizer, folder, dtype=torch.float32)
    exported = AutoModelForCausalLM.from_pretrained(folder)

    def tokens(ids: list[int], ends: Ends, sampling: Sampling) -> list[int]:
        stop = sorted(sampling.ends(ends))
        how = {
            "max_new_tokens": NEW,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": stop or None,
            "repetition_penalty": sampling.repetition_penalty,
            "min_new_tokens": sampling.min_new_tokens or None,
        }
        new = exported.generate(torch.tensor([ids]), **how)[0, len(ids) :].tolist()
        return list(itertools.takewhile(lambda token: token not in stop, new))

    plain = [tokens(ids, (), Sampling(NEW)) for ids in prompts()]
    chosen = [tokens(ids, *choice) for ids, choice in zip(prompts(), choices(plain), strict=True)]
    return plain, chosen


def generated(model: ModelConfig, tp: int, pp: int, folder: Path, plain: list) -> list:
    gpt = load(model, tp, pp, folder)
    chosen = choices(plain)
    engine = DynamicEngine(gpt, model, end_ids=chosen[0][0], max_requests=3)
    for i, (ids, (_, sampling)) in enumerate(zip(prompts(), chosen, strict=True)):
        engine.add(Request(i, tuple(ids), sampling))
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert engine.free_blocks == 3 * 64 // 16
    tokens = [[t for o in outputs if o.id == i for t in o.new_ids] for i in range(len(chosen))]
    for i, ids in enumerate(tokens):
        reasons = [o.finish_reason for o in outputs if o.id == i]
        assert set(reasons[:-1]) <= {None}
        assert reasons[-1] == ("length" if len(ids) == NEW else "stop"), i
    static = generate_static(
        gpt,
        model,
        [Request(0, tuple(prompts()[0]), chosen[0][1])],
        end_ids=chosen[0][0],
    )
    assert list(static[0]) == tokens[0]
    return tokens


@pytest.mark.parametrize(
    ("tp", "pp"),
    [(1, 1), (1, 2), pytest.param(2, 1, marks=pytest.mark.slow)],
)
def test_ends_penalties_and_least_lengths_are_transformers(
    tp: int, pp: int, tmp_path: Path
) -> None:
    model, folder = tiny("ladder"), tmp_path / "weights"
    run_ranks(1, save_weights, model, folder, tmp_path=tmp_path)
    plain, chosen = expected(model, folder, tmp_path / "exported")
    # Each of the choices matters.
    assert len(chosen[0]) < NEW > len(chosen[3]) and len(chosen[1]) >= 12
    assert all(len(new) >= NEW and new != old for new, old in [(chosen[2], plain[2])])
    assert chosen[4] != plain[4]
    for tokens in run_ranks(tp * pp, generated, model, tp, pp, folder, plain, tmp_path=tmp_path):
        assert tokens == chosen


def odd_values(model: ModelConfig, folder: Path) -> None:
    gpt = load(model, 1, 1, folder)

    def tokens(**how: float) -> dict[int, list[int]]:
        engine = DynamicEngine(gpt, model, end_ids=(), max_requests=4)
        for i, ids in enumerate(prompts()):
            engine.add(Request(i, tuple(ids), replace(Sampling(8), **how)))
        return finish(engine)

    greedy = tokens()
    hot = tokens(temperature=2.0)
    assert hot != greedy
    for top_k in (VOCAB, VOCAB + 1, 10**6, 1 << 40):
        assert tokens(temperature=2.0, top_k=top_k) == hot
    for temperature in (1e-6, 1e-30, 1e-300):
        assert tokens(temperature=temperature) == greedy
    assert tokens(temperature=2.0, top_p=1e-50) == greedy
    assert tokens(temperature=2.0, top_k=1, top_p=0.9) == greedy
    assert tokens(temperature=2.0, top_k=1 << 40, top_p=0.9) == tokens(temperature=2.0, top_p=0.9)
    both = tokens(temperature=2.0, top_k=3, top_p=0.99999)
    assert both not in (greedy, hot, tokens(temperature=2.0, top_p=0.99999))
    static = generate_static(
        gpt, model, [Request(0, (3, 4), Sampling(4, 1.0, top_k=1 << 40, top_p=0.5))], end_ids=()
    )
    assert len(static[0]) == 4
    engine = DynamicEngine(gpt, model, end_ids=())
    with pytest.raises(UserError, match=f"prompt contains token id {VOCAB}"):
        engine.add(Request(0, (1, VOCAB), Sampling(1)))
    with pytest.raises(UserError, match="stop_token_ids contains token id -1"):
        engine.add(Request(0, (1,), Sampling(1, stop_ids=(-1,))))


def test_odd_values_do_not_end_the_engine(tmp_path: Path) -> None:
    """Each of these once ended megatron-core's engine by an assertion, or was no limit at all."""
    model, folder = tiny("ladder"), tmp_path / "weights"
    run_ranks(1, save_weights, model, folder, tmp_path=tmp_path)
    run_ranks(1, odd_values, model, folder, tmp_path=tmp_path)


def test_top_k_then_top_p_leave_what_transformers_leaves() -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(5)) * 3
    for top_k, top_p in ((5, 0.8), (30, 0.3), (80, 0.95)):
        kept = logits.clone()
        keep_likeliest(kept, Sampling(1, 1.3, top_k, top_p))
        ids = torch.zeros(7, 1, dtype=torch.int64)
        theirs = TopKLogitsWarper(min(top_k, 50))(ids, logits / 1.3)
        theirs = TopPLogitsWarper(top_p)(ids, theirs)
        ours = TopPLogitsWarper(top_p)(ids, kept / 1.3)  # megatron-core's is the same
        assert torch.equal(ours, theirs)
