"""Collectives are under way while a neighbour computes: forward, backward, recomputed, with and without
sequence parallelism. Seen in the trace that `bench trace` records.
"""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_ladder.collectives import backward_order
from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.mcore_compat import initialize_model_parallel
from pretrain.bench.decoder import Decoder
from pretrain.bench.recorder import Recorder
from pretrain.bench.timeline import Span
from pretrain.bench.wire import over
from tests.ranks import run_ranks

LAYERS = 4
NAMES = [f"{kind} {i}" for i in range(1, LAYERS + 1) for kind in ("attention", "mlp")]
HALVES = {"tp_overlap": "halves"}
# Each kind that hides: what makes it, and its collectives in their order.
KINDS: dict[str, tuple[dict, list[str]]] = {
    "ladder": ({"residual": "ladder"}, NAMES),
    "parallel-ladder": (
        {"residual": "parallel-ladder"},
        [f"layer {i}" for i in range(1, LAYERS + 1)],
    ),
    "standard in halves": (
        {"residual": "standard"} | HALVES,
        [f"{name}{half}" for name in NAMES for half in "ab"],
    ),
    "parallel in halves": (
        {"residual": "parallel"} | HALVES,
        [f"layer {i}{half}" for i in range(1, LAYERS + 1) for half in "ab"],
    ),
}


def record(
    kind: dict, recompute: str, sequence_parallel: bool, mended: bool = True, context: int = 1
) -> list[Span]:
    backward_order.enabled = mended
    residual = dict(kind)
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        context_parallel_size=context,
        tp_overlap=residual.pop("tp_overlap", "none"),
    )
    parallel_state.destroy_model_parallel()
    initialize_model_parallel(parallel, seed=0)
    model = ModelConfig(
        num_layers=LAYERS,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=2,
        vocab_size=100,
        **residual,
    )
    decoder = Decoder(model, parallel, micro_batch_size=2, seq_length=16, recompute=recompute)
    recorder = Recorder(decoder, torch.distributed.get_rank())
    with over(parallel_state.get_tensor_model_parallel_group(), lambda *_: 0.0, recorder):
        return recorder.step()


class Trace:
    """Spans, asked by sub-module."""

    def __init__(self, spans: list[Span], direction: str) -> None:
        self.spans = [s for s in spans if s.direction == direction]
        assert self.spans

    def parts(self, name: str) -> list[Span]:
        """A sub-module's own work without the waits in it; of a layer, that of attention and MLP."""
        names = [name.replace("layer", part) for part in ("attention", "mlp")]
        return [s for s in self.spans if s.kind == "compute" and s.name in names]

    def compute(self, name: str) -> tuple[float, float]:
        """From the first to the last moment of a sub-module's own work."""
        parts = self.parts(name)
        return min(p.start_s for p in parts), max(p.end_s for p in parts)

    def collectives(self, name: str) -> list[tuple[float, float]]:
        """(started, waited for) of a sub-module's collectives, in the order of their waits."""
        flights, waits = (
            [s for s in self.spans if s.kind == kind and s.name == name]
            for kind in ("flight", "wait")
        )
        assert len(flights) == len(waits) > 0
        return [(f.start_s, w.start_s) for f, w in zip(flights, waits, strict=True)]


# Each kind with each recomputation; and over two context-parallel ranks, whose attentions wait for each
# other.
CASES = [
    *((kind, recompute, 1) for kind in KINDS for recompute in ("none", "full")),
    ("ladder", "full", 2),
    *(
        pytest.param(kind, recompute, 2, marks=pytest.mark.slow)
        for kind in KINDS
        for recompute in ("none", "full")
        if (kind, recompute) != ("ladder", "full")
    ),
]


@pytest.mark.parametrize(("kind", "recompute", "context"), CASES)
def test_every_collective_but_the_ends_has_a_neighbours_compute_to_hide_behind(
    kind: str, recompute: str, context: int, tmp_path: Path
) -> None:
    """A neighbour is the next sub-module or layer; of halves it is the other half."""
    options, names = KINDS[kind]
    how = (options, recompute, False, True, context)
    spans = run_ranks(2 * context, record, *how, tmp_path=tmp_path)[0]
    forward, backward = Trace(spans, "forward"), Trace(spans, "backward")
    for this, following in pairwise(names):
        ((started, waited),) = forward.collectives(this)
        begin, end = forward.compute(following)
        assert started < begin < end < waited, f"forward, {this}"
    for previous, this in pairwise(names):
        ((started, waited),) = backward.collectives(this)
        begin, end = backward.compute(previous)
        assert started < begin < end < waited, f"backward, {this}"
        if recompute == "full":
            begin, end = Trace(spans, "recompute").compute(previous)
            assert started < begin < end < waited, f"recomputed, {this}"
    # The last of a pass has nothing after it.
    for trace, name in ((forward, names[-1]), (backward, names[0])):
        ((started, waited),) = trace.collectives(name)
        assert max(trace.compute(n)[1] for n in names) <= waited
    # The gradient's reduction starts before the weight gradient is computed.
    for name in names:
        ((started, _),) = backward.collectives(name)
        begin, end = backward.compute(name)
        assert begin < started < end
    if recompute == "full":  # nothing is communicated again
        assert all(s.kind == "compute" for s in Trace(spans, "recompute").spans)


@pytest.mark.parametrize(("kind", "recompute", "context"), CASES)
def test_with_sequence_parallelism_each_of_the_pair_has_a_part_of_the_neighbour(
    kind: str, recompute: str, context: int, tmp_path: Path
) -> None:
    options, names = KINDS[kind]
    how = (options, recompute, True, True, context)
    spans = run_ranks(2 * context, record, *how, tmp_path=tmp_path)[0]
    forward, backward = Trace(spans, "forward"), Trace(spans, "backward")

    def computed_between(trace: Trace, name: str, since: float, until: float) -> bool:
        """Whether a part of `name`'s own work, uninterrupted, lies in that time."""
        return any(since < part.end_s and part.start_s < until for part in trace.parts(name))

    for index, name in enumerate(names):
        gather, scatter = forward.collectives(name)
        # The input is gathered behind the sub-module before, the output scattered behind the next.
        if index > 0:
            assert computed_between(forward, names[index - 1], *gather), f"gather {name}"
        if index + 1 < len(names):
            assert computed_between(forward, names[index + 1], *scatter), f"scatter {name}"
            assert scatter[1] < forward.compute(names[index + 1])[1]
        gradient_of_output, *input_again, gradient_of_input = sorted(
            backward.collectives(name), key=lambda c: c[0]
        )
        assert len(input_again) == (0 if "parallel" in kind else 1)  # parallel layers keep theirs
        if index + 1 < len(names):
            following = names[index + 1]
            assert computed_between(backward, following, *gradient_of_output), f"grad {name}"
            for again in input_again:
                assert computed_between(backward, following, *again), f"again {name}"
        if index > 0:
            previous = names[index - 1]
            parts = [backward] + ([Trace(spans, "recompute")] if recompute == "full" else [])
            assert any(computed_between(p, previous, *gradient_of_input) for p in parts), name


def test_standard_layers_of_a_hybrid_wait_before_the_next_submodule(tmp_path: Path) -> None:
    hybrid = {"residual": "ladder", "ladder_layers": 2}
    forward = Trace(run_ranks(2, record, hybrid, "none", False, tmp_path=tmp_path)[0], "forward")
    for name, following in (("attention 1", "mlp 1"), ("mlp 1", "attention 2")):
        ((_, waited),) = forward.collectives(name)
        assert waited < forward.compute(following)[0]
    # The first ladder layer hides the last standard MLP's collective behind its attention.
    ((_, waited),) = forward.collectives("mlp 2")
    assert forward.compute("attention 3")[1] < waited


@pytest.mark.parametrize("kind", KINDS)
def test_autograds_own_order_does_not_overlap_backward(kind: str, tmp_path: Path) -> None:
    """What backward_order.py mends; were this to fail, torch had changed its order."""
    options, names = KINDS[kind]
    spans = run_ranks(2, record, options, "none", False, False, tmp_path=tmp_path)[0]
    backward = Trace(spans, "backward")
    for previous, this in pairwise(names):
        ((_, waited),) = backward.collectives(this)
        assert waited < backward.compute(previous)[0]


def test_without_the_private_api_training_goes_on_with_a_warning(caplog) -> None:
    backward_order._warned = False
    backward_order.run_no_sooner_than(object(), 1)
    backward_order.run_no_sooner_than(object(), 1)
    assert [r.message for r in caplog.records if "not hidden" in r.message] != []
    assert len(caplog.records) == 1
