"""megatron-core's engines, static and dynamic, over tensor-parallel ranks and pipeline stages, give the
tokens that the exported folder gives in transformers."""

import itertools
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from transformers import AutoModelForCausalLM

from megatron_ladder.collectives.points import SubmoduleCollectives
from megatron_ladder.config import FRESH, ModelConfig, ParallelConfig, Residual
from megatron_ladder.errors import UserError
from megatron_ladder.hf.export import export_folder
from megatron_ladder.hf.model_config import to_hf_config
from megatron_ladder.inference.engine import DynamicEngine, _check_attention, generate_static
from megatron_ladder.inference.experts import ranks_of_experts
from megatron_ladder.inference.requests import Request, Sampling
from megatron_ladder.mcore_compat import (
    build_gpt_model,
    initialize_model_parallel,
    transformer_config,
)
from pretrain.run.checkpoint import load_initial_weights, load_weights
from tests.distributed.test_parity import KINDS, LOGITS_TOLERANCE, VOCAB, oracle, save_model
from tests.ranks import run_ranks
from tests.unit.hf.tiny import train_sentencepiece

NEW = 24
LENGTHS = (5, 12, 8, 1, 33)
SOME_LAYOUTS = [(1, 1), (2, 1), (1, 2)]
"""Tensor- and pipeline-parallel sizes."""
LAYOUTS = [*SOME_LAYOUTS, (4, 1), (2, 2)]
KINDS_AND_LAYOUTS = [
    pytest.param("ladder", SOME_LAYOUTS, id="ladder"),
    pytest.param("ladder, windows", [(2, 1)], id="windows"),
    pytest.param("parallel-ladder", [(2, 1), (1, 2)], id="parallel-ladder"),
    pytest.param("ladder by skipinit", [(2, 1), (1, 2)], id="ladder by skipinit"),
    *(
        pytest.param(kind, LAYOUTS, id=f"{kind}-all", marks=pytest.mark.slow)
        for kind in (
            *("standard", "parallel", "ladder", "last-n", "parallel-ladder", "standard, windows"),
        )
    ),
]
NO_EOD = VOCAB + 1


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (length,), generator=draw).tolist() for length in LENGTHS]


def tiny(kind: str) -> ModelConfig:
    model = ModelConfig(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=8,
        num_query_groups=4,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        share_embeddings_and_output_weights=False,
        rope_scaling_factor=8.0,
        rotary_base=500_000.0,
        **KINDS[kind.removesuffix(", windows")],
    )
    if not kind.endswith("windows"):
        return model
    windows = {"sliding_window": 6, "sliding_window_layers": (0, 1, 3)}
    return replace(model, rope_scaling_type="yarn", **windows)


def build(model: ModelConfig, tp: int, pp: int) -> torch.nn.Module:
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    experts = ranks_of_experts(model, parallel)
    parallel = replace(parallel, expert_model_parallel_size=experts)
    parallel_state.destroy_model_parallel()
    initialize_model_parallel(parallel, seed=0)
    config = transformer_config(model, parallel, inference=True)
    (gpt,) = build_gpt_model(model, config)
    return gpt.eval()


def save_weights(model: ModelConfig, folder: Path) -> None:
    """Large enough that the tokens vary; those that pad the vocabulary would win if they could."""
    gpt = build(model, 1, 1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if "norm" in name or "scales" in name:
                parameter.uniform_(0.5, 1.5, generator=draw)
            else:
                parameter.normal_(std=0.25, generator=draw)
        gpt.output_layer.weight[VOCAB:] *= 10
    save_model(gpt, folder)


def load(model: ModelConfig, tp: int, pp: int, folder: Path) -> torch.nn.Module:
    gpt = build(model, tp, pp)
    load_initial_weights(folder, {"model": gpt})
    return gpt


def requests(new: int = NEW) -> list[Request]:
    return [Request(i, tuple(ids), Sampling(new)) for i, ids in enumerate(prompts())]


def finish(engine: DynamicEngine) -> dict[int, list[int]]:
    """Runs until nothing is left; the tokens of each request."""
    tokens: dict[int, list[int]] = {}
    while engine.has_work():
        for output in engine.step():
            tokens.setdefault(output.id, []).extend(output.new_ids)
    return tokens


def generate(model: ModelConfig, tp: int, pp: int, folder: Path) -> list[list[list[int]]]:
    """On each rank, static and dynamic: the new tokens of each prompt."""
    gpt = load(model, tp, pp, folder)
    static = generate_static(gpt, model, requests(), end_ids=[NO_EOD])
    # Three at a time: requests begin while others are under way.
    engine = DynamicEngine(gpt, model, end_ids=[NO_EOD], max_requests=3)
    for request in requests():
        engine.add(request)
    dynamic = finish(engine)
    assert engine.free_blocks == 3 * 64 // 16
    return [[list(tokens) for tokens in static], [dynamic[i] for i in range(len(LENGTHS))]]


def expected_tokens(model: ModelConfig, folder: Path) -> list[list[int]]:
    """By the plain model, without a cache."""
    plain = oracle(model, folder.parent).eval()
    result, lead = [], float("inf")
    for ids in prompts():
        tokens = list(ids)
        for _ in range(NEW):
            with torch.no_grad():
                best = plain(torch.tensor([tokens])).logits[0, -1, :VOCAB].topk(2)
            lead = min(lead, float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
        result.append(tokens[len(ids) :])
    assert lead > 2 * LOGITS_TOLERANCE, "a near-tie, which rounding decides: draw other weights"
    assert all(len(set(tokens)) > 5 for tokens in result), "repeating itself proves little"
    return result


def exported_tokens(model: ModelConfig, weights: Path, folder: Path) -> list[list[int]]:
    """By transformers, from the folder that `export` makes."""
    export_folder(
        load_weights(weights),
        to_hf_config(model, eod_id=2),
        train_sentencepiece(weights.parent, "bpe"),
        folder,
        dtype=torch.float32,
    )
    exported = AutoModelForCausalLM.from_pretrained(folder)
    how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [exported.generate(torch.tensor([ids]), **how)[0, -NEW:].tolist() for ids in prompts()]


@pytest.mark.parametrize(("kind", "layouts"), KINDS_AND_LAYOUTS)
def test_layouts_engines_and_the_exported_folder_give_the_same_tokens(
    kind: str, layouts: list[tuple[int, int]], tmp_path: Path
) -> None:
    model = tiny(kind)
    folder = tmp_path / "weights"
    run_ranks(1, save_weights, model, folder, tmp_path=tmp_path)
    expected = expected_tokens(model, folder)
    assert exported_tokens(model, folder, tmp_path / "exported") == expected
    for tp, pp in layouts:
        for static, dynamic in run_ranks(
            tp * pp, generate, model, tp, pp, folder, tmp_path=tmp_path
        ):
            assert static == expected, (tp, pp)
            assert dynamic == expected, (tp, pp)


def lives(model: ModelConfig, folder: Path) -> None:
    """What may happen to a request beside others, on one rank."""
    gpt = load(model, 1, 1, folder)
    alone = generate_static(gpt, model, requests(), end_ids=[NO_EOD])

    # The token that ends a text is not given; what comes before is.
    eod = alone[0][6]
    cut = list(alone[0][: alone[0].index(eod)])
    engine = DynamicEngine(gpt, model, end_ids=[eod], max_requests=4)
    engine.add(requests()[0])
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert [token for output in outputs for token in output.new_ids] == cut
    assert [output.finish_reason for output in outputs][-1] == "stop"
    assert list(generate_static(gpt, model, requests()[:1], end_ids=[eod])[0]) == cut

    # A cancelled request gives its blocks back, whether it waits or runs, and disturbs no other.
    engine = DynamicEngine(gpt, model, end_ids=[NO_EOD], max_requests=2)
    whole = engine.free_blocks
    for request in requests()[:4]:
        engine.add(request)
    tokens: dict[int, list[int]] = {}
    for step in range(200):
        if step == 5:
            engine.cancel(0)  # runs
            engine.cancel(3)  # waits
            engine.cancel(77)  # nobody
        for output in engine.step():
            assert step <= 5 or output.id != 0
            tokens.setdefault(output.id, []).extend(output.new_ids)
        if not engine.has_work():
            break
    assert tokens[1] == list(alone[1]) and tokens[2] == list(alone[2])
    assert len(tokens[0]) == 5 and 3 not in tokens
    assert engine.free_blocks == whole

    # A cache for one request at a time: they wait for each other, and none is refused.
    engine = DynamicEngine(gpt, model, end_ids=[NO_EOD], max_requests=4, cache_tokens=64)
    for request in requests():
        engine.add(request)
    assert finish(engine) == {i: list(tokens) for i, tokens in enumerate(alone)}

    # One that could never run is refused.
    small = DynamicEngine(gpt, model, end_ids=[NO_EOD], max_requests=4, cache_tokens=32)
    with pytest.raises(UserError, match="exceed the cache of 32 tokens"):
        small.add(requests()[4])
    with pytest.raises(UserError, match="exceed the model's context of 64"):
        engine.add(Request(9, tuple(prompts()[4]), Sampling(32)))
    with pytest.raises(UserError, match="a prompt is empty"):
        engine.add(Request(9, (), Sampling(1)))

    # Sampling: the same seed, the same tokens; one of one is greedy.
    def sampled(seed: int, **how: float) -> dict[int, list[int]]:
        engine = DynamicEngine(gpt, model, end_ids=[NO_EOD], max_requests=4, seed=seed)
        for i, ids in enumerate(prompts()):
            engine.add(Request(i, tuple(ids), Sampling(8, **how)))
        return finish(engine)

    hot = sampled(1, temperature=2.0)
    assert hot == sampled(1, temperature=2.0) != sampled(2, temperature=2.0)
    assert all(token < VOCAB for tokens in hot.values() for token in tokens)
    greedy = {i: list(tokens[:8]) for i, tokens in enumerate(alone)}
    assert sampled(3, temperature=2.0, top_k=1) == greedy
    assert sampled(3, temperature=0.7, top_p=1e-6) == greedy


def test_requests_come_end_and_are_cancelled(tmp_path: Path) -> None:
    model = tiny("ladder")
    folder = tmp_path / "weights"
    run_ranks(1, save_weights, model, folder, tmp_path=tmp_path)
    run_ranks(1, lives, model, folder, tmp_path=tmp_path)


def overlap_of_decode(model: ModelConfig, folder: Path) -> list[tuple[str, str]]:
    """What happens in one decode step, in order: begin and end of sub-modules, start and wait of sums."""
    gpt = load(model, 2, 1, folder)
    events: list[tuple[str, str]] = []
    for number, layer in enumerate(gpt.decoder.layers, start=1):
        for kind, module in (("attention", layer.self_attention), ("mlp", layer.mlp)):
            name = f"{kind} {number}"
            module.register_forward_pre_hook(lambda *_, n=name: events.append(("begin", n)))
            module.register_forward_hook(lambda *_, n=name: events.append(("end", n)))
    start, wait = SubmoduleCollectives.start_output, SubmoduleCollectives.wait_output

    def started(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.name = events[-1][1]
        events.append(("start", self.name))
        return start(self, x)

    def waited(self: Any) -> None:
        events.append(("wait", self.name))
        wait(self)

    SubmoduleCollectives.start_output, SubmoduleCollectives.wait_output = started, waited
    engine = DynamicEngine(gpt, model, end_ids=[NO_EOD], max_requests=2)
    for request in requests()[:2]:
        engine.add(request)
    engine.step()  # the prompts
    events.clear()
    engine.step()
    return events


@pytest.mark.parametrize("kind", ["ladder", "parallel-ladder"])
def test_sums_of_decode_are_under_way_while_what_comes_next_computes(
    kind: Residual, tmp_path: Path
) -> None:
    """A sub-module, or a whole parallel-ladder layer; a standard or parallel one waits at once."""
    model = replace(tiny(kind), ladder_layers=2)
    residuals = model.layer_residuals()
    assert {kind, FRESH[kind]} == set(residuals)
    folder = tmp_path / "weights"
    run_ranks(1, save_weights, model, folder, tmp_path=tmp_path)
    for events in run_ranks(2, overlap_of_decode, model, folder, tmp_path=tmp_path):
        # What each sum is of: the first and the last sub-module.
        parts = [((f"attention {i}",) * 2, (f"mlp {i}",) * 2) for i in range(1, 5)]
        if kind == "parallel-ladder":
            parts = [((f"attention {i}", f"mlp {i}"),) for i in range(1, 5)]
        for (_, this), (first, last) in pairwise(itertools.chain(*parts)):
            number = int(last.split()[1])
            begin, end = events.index(("begin", first)), events.index(("end", last))
            start, wait = (events.index((what, this)) for what in ("start", "wait"))
            if residuals[number - 1] == kind:
                assert start < begin < end < wait, this
            else:
                assert start < wait < begin, this


def test_an_engine_that_lacks_a_models_attention_is_not_used() -> None:
    """megatron-core 0.16 on a GPU. On a CPU attention is this project's, and 0.19 has both."""
    chunks = {
        is_cuda: SimpleNamespace(parameters=lambda on=is_cuda: iter([SimpleNamespace(is_cuda=on)]))
        for is_cuda in (False, True)
    }
    windows = tiny("ladder, windows")
    yarn = replace(windows, sliding_window=windows.max_position_embeddings)
    _check_attention(chunks[True], tiny("ladder"))
    _check_attention(chunks[True], replace(yarn, rope_attention_factor=1.0))
    for model, message in (
        (windows, "sliding_window is 6: the engine of this"),
        (yarn, "rope_scaling_type is yarn: the engine of this"),
    ):
        _check_attention(chunks[False], model)
        if version("megatron-core") < "0.19":
            with pytest.raises(UserError, match=message):
                _check_attention(chunks[True], model)
        else:
            _check_attention(chunks[True], model)
