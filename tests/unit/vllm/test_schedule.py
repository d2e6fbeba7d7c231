"""The order of sub-modules and sums when serving, without vLLM; modeling_ladder.py is the oracle."""

import operator

import pytest
import torch
from torch import Tensor

from megatron_ladder.hf import LadderForCausalLM
from megatron_ladder.hf.modelling.rotary_ladder import rope_cos_sin
from megatron_ladder.vllm.all_reduce import FINISH, START, AllReduce, run_between_graphs
from megatron_ladder.vllm.schedule import (
    InFlight,
    State,
    Sums,
    ladder_layer,
    parallel_ladder_layer,
    parallel_layer,
    standard_layer,
    whole,
)
from tests.unit.hf import tiny


class RecordedSums:
    """Sums of one rank, each a copy that is no number until it is waited for; `log` says what happened."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def at_once(self, partial: Tensor) -> Tensor:
        self.log.append("sum")
        return partial

    def start(self, partial: Tensor) -> InFlight:
        name = self.log[-1]
        self.log.append(f"start {name}")
        return InFlight(partial, torch.full_like(partial, torch.nan))

    def finish(self, residual: Tensor, output: InFlight) -> Tensor:
        starts = [entry for entry in self.log if entry.startswith("start ")]
        ends = [entry for entry in self.log if entry.startswith("finish ")]
        self.log.append(f"finish {starts[len(ends)].removeprefix('start ')}")
        return residual + output.partial


def run(model: LadderForCausalLM, ids: Tensor, sums: Sums, log: list[str]) -> Tensor:
    """The last layer's `m`, by schedule.py, with the oracle's sub-modules."""
    cos, sin = rope_cos_sin(model.config, torch.arange(ids.shape[1])[None], torch.float32)
    mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
    embedding = model.model.embed_tokens(ids)
    state = State(embedding, embedding, None)
    for number, layer in enumerate(model.model.layers):

        def attention(x: Tensor, layer=layer, number=number) -> Tensor:
            log.append(f"attention {number}")
            return layer.self_attn(layer.input_layernorm(x), cos, sin, mask)

        def mlp(x: Tensor, layer=layer, number=number) -> Tensor:
            log.append(f"mlp {number}")
            return layer.mlp(layer.post_attention_layernorm(x))

        def both(x: Tensor, layer=layer, number=number, attention=attention) -> Tensor:
            attended = attention(x)
            log.append(f"mlp {number}")
            return attended + layer.mlp(layer.input_layernorm(x))

        if layer.residual == "parallel":
            state = parallel_layer(state, both, sums)
        elif layer.residual == "parallel-ladder":
            state = parallel_ladder_layer(state, both, sums)
        elif layer.residual == "ladder":
            state = ladder_layer(state, attention, mlp, sums)
        else:
            state = standard_layer(state, attention, mlp, sums)
    return whole(state, sums)[1]


@torch.no_grad()
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_states_are_the_oracles(kind: str) -> None:
    torch.manual_seed(0)
    model = tiny.model(**tiny.KINDS[kind])
    model.config._attn_implementation = "eager"
    ids = tiny.tokens()
    log: list[str] = []
    found = model.model.norm(run(model, ids, RecordedSums(log), log))
    torch.testing.assert_close(found, model.model(ids).last_hidden_state, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_ladder_sum_starts_before_the_next_sub_module_and_is_waited_for_after_it() -> None:
    model = tiny.model(residual="ladder", num_hidden_layers=2)
    model.config._attn_implementation = "eager"
    log: list[str] = []
    run(model, tiny.tokens(), RecordedSums(log), log)
    assert log == [
        *("attention 0", "start attention 0"),
        *("mlp 0", "start mlp 0", "finish attention 0"),
        *("attention 1", "start attention 1", "finish mlp 0"),
        *("mlp 1", "start mlp 1", "finish attention 1"),
        "finish mlp 1",
    ]


@torch.no_grad()
def test_a_hybrid_waits_before_a_standard_layer_and_sums_there_at_once() -> None:
    model = tiny.model(residual="ladder", ladder_layers=[0], num_hidden_layers=2)
    model.config._attn_implementation = "eager"
    log: list[str] = []
    run(model, tiny.tokens(), RecordedSums(log), log)
    assert log == [
        *("attention 0", "start attention 0"),
        *("mlp 0", "start mlp 0", "finish attention 0"),
        "finish mlp 0",
        *("attention 1", "sum", "mlp 1", "sum"),
    ]


@torch.no_grad()
def test_a_parallel_ladder_sum_is_waited_for_after_the_whole_next_layer() -> None:
    """It is the sum of both outputs; a parallel layer reads it complete, and the layer after that does not
    read that layer's."""
    layers = [0, 1, 3]
    model = tiny.model(residual="parallel-ladder", ladder_layers=layers)
    model.config._attn_implementation = "eager"
    log: list[str] = []
    run(model, tiny.tokens(), RecordedSums(log), log)
    assert log == [
        *("attention 0", "mlp 0", "start mlp 0"),
        *("attention 1", "mlp 1", "start mlp 1", "finish mlp 0"),
        *("finish mlp 1", "attention 2", "mlp 2", "sum"),
        *("attention 3", "mlp 3", "start mlp 3", "finish mlp 3"),
    ]


def test_dynamo_keeps_both_operators_in_that_order_and_breaks_no_graph() -> None:
    """Only the fake implementations run here: there is no group. vLLM cuts the graph at these operators,
    and keeps two that are neighbours in one cut."""
    sums = AllReduce("nobody", operator.neg)
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return lambda *args: (args[-1],)

    @torch.compile(backend=record, fullgraph=True)
    def two_layers(x: Tensor) -> Tensor:
        state = State(x, x, None)
        for _ in range(2):
            state = ladder_layer(state, torch.sin, torch.cos, sums)
        return whole(state, sums)[1]

    two_layers(torch.ones(2, 3))
    start, finish = (name.replace("::", ".") for name in (START, FINISH))
    names = ("sin", "cos", start, finish)
    order = [next(name for name in names if name in target) for target in seen]
    assert order == [
        *("sin", start, "cos", start, finish),
        *("sin", start, finish, "cos", start, finish),
        finish,
    ]
    torch._dynamo.reset()


def test_one_rank_sums_nothing() -> None:
    sums = AllReduce(None, operator.neg)
    partial = torch.ones(2, 3)
    assert torch.equal(sums.finish(torch.full((2, 3), 2.0), sums.start(partial)), partial * 3)


def test_the_operators_run_between_graphs_where_there_are_pieces() -> None:
    attention = ["vllm::attention"]
    run_between_graphs(attention)
    run_between_graphs(attention)
    assert attention == ["vllm::attention", START, FINISH]
    whole_forward: list[str] = []
    run_between_graphs(whole_forward)
    run_between_graphs(None)
    assert whole_forward == []
