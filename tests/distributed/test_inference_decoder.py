"""What the inference benchmark times computes what training computes, and overlaps what it should."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from measuring.inference.decoder import InferenceDecoder
from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.mcore_compat import initialize_model_parallel
from pretrain.bench.recorder import Recorder
from pretrain.bench.wire import over
from tests.ranks import run_ranks

PROMPT, NEW, LAYERS = 6, 4, 3
MIDDLE = PROMPT + NEW // 2


def decoder(residual: str) -> InferenceDecoder:
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    parallel_state.destroy_model_parallel()
    initialize_model_parallel(parallel, seed=0)
    model = ModelConfig(
        num_layers=LAYERS,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=100,
        residual=residual,
    )
    return InferenceDecoder(model, parallel, sequences=2, prompt_length=PROMPT, new_tokens=NEW)


def outputs(residual: str) -> tuple[torch.Tensor, ...]:
    """Without a cache, and of prefill and decode."""
    made = decoder(residual)
    with torch.no_grad():
        whole = made.forward()
    prefilled = made.prefill().clone()
    made.generate_half()
    return whole, prefilled, made.decode()


@pytest.mark.parametrize(
    "residual", ["standard", "parallel", "ladder", "parallel-ladder", "no-comm"]
)
def test_prefill_and_decode_are_a_pass_without_a_cache(residual: str, tmp_path: Path) -> None:
    for whole, prefilled, decoded in run_ranks(2, outputs, residual, tmp_path=tmp_path):
        assert whole.std() > 0.1
        torch.testing.assert_close(prefilled, whole[:PROMPT])
        torch.testing.assert_close(decoded, whole[MIDDLE : MIDDLE + 1])


def halves(residual: str) -> tuple[torch.Tensor, ...]:
    """Prefill and decode, whole and as two half-batches."""
    made = decoder(residual)
    whole, in_halves = made.prefill().clone(), made.prefill_in_halves().clone()
    made.generate_half()
    return whole, in_halves, made.decode().clone(), made.decode_in_halves()


@pytest.mark.parametrize("residual", ["parallel", pytest.param("ladder", marks=pytest.mark.slow)])
def test_half_batches_compute_the_same(residual: str, tmp_path: Path) -> None:
    for whole, in_halves, decoded, decoded_in_halves in run_ranks(
        2, halves, residual, tmp_path=tmp_path
    ):
        torch.testing.assert_close(in_halves, whole)
        torch.testing.assert_close(decoded_in_halves, decoded)


def trace(residual: str) -> list[Any]:
    made = decoder(residual)
    made.generate_half()
    recorder = Recorder(made, torch.distributed.get_rank())
    with over(parallel_state.get_tensor_model_parallel_group(), lambda *_: 0.0, recorder):
        return recorder.forward(made.decode)


def test_in_decode_a_neighbour_computes_while_a_sum_is_under_way(tmp_path: Path) -> None:
    names = [f"{kind} {i}" for i in range(1, LAYERS + 1) for kind in ("attention", "mlp")]
    for residual, hides in (("ladder", True), ("standard", False)):
        spans = run_ranks(2, trace, residual, tmp_path=tmp_path)[0]
        by_kind = {
            kind: {s.name: s for s in spans if s.kind == kind}
            for kind in ("compute", "flight", "wait")
        }
        for this, following in pairwise(names):
            started = by_kind["flight"][this].start_s
            waited = by_kind["wait"][this].start_s
            computed = by_kind["compute"][following]
            between = started < computed.start_s < computed.end_s < waited
            assert between == hides, f"{residual}, {this}"
