"""The fields of a mixture of experts: what goes together, which layers have experts, what is counted."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_ladder.config import ModelConfig, ParallelConfig, check_layout
from megatron_ladder.errors import UserError
from megatron_ladder.fields.experts import ExpertsConfig, megatron_fields

EXPERTS = ExpertsConfig(
    num_moe_experts=8, moe_ffn_hidden_size=32, moe_shared_expert_intermediate_size=48
)
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=192,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=200,
    residual="standard",
    experts=EXPERTS,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_moe_experts": None}, "moe_ffn_hidden_size is set, but .*num_moe_experts is not"),
        ({"num_moe_experts": 1}, "num_moe_experts is 1"),
        ({"moe_router_topk": 9}, "moe_router_topk 9: .* no more of them to a token"),
        ({"moe_router_topk": 0}, "moe_router_topk is 0"),
        ({"moe_ffn_hidden_size": 0}, "moe_ffn_hidden_size is 0"),
        ({"moe_router_topk": 1}, "the router would learn nothing"),
        (
            {"moe_router_pre_softmax": True, "moe_router_score_function": "sigmoid"},
            "goes with moe_router_score_function softmax: it is sigmoid",
        ),
        ({"moe_router_enable_expert_bias": True}, "goes with .* sigmoid: it is softmax"),
        ({"moe_aux_loss_coeff": -1.0}, "moe_aux_loss_coeff is -1.0"),
        ({"moe_router_load_balancing_type": "x"}, "load_balancing_type is 'x': choose one of seq_"),
        ({"moe_router_score_function": "relu"}, "is 'relu': choose one of softmax, sigmoid"),
        ({"moe_pad_expert_input_to_capacity": True}, "needs a moe_expert_capacity_factor"),
        ({"moe_expert_capacity_factor": 0.0}, "moe_expert_capacity_factor is 0.0"),
        (
            {
                "moe_expert_capacity_factor": 1.0,
                "moe_router_load_balancing_type": "global_aux_loss",
            },
            "does not go with .* global_aux_loss",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(EXPERTS, **change)


@pytest.mark.parametrize(
    ("freq", "layers"),
    [(1, "1111"), (2, "1010"), (3, "1001"), (9, "1000"), ((0, 1, 1, 0), "0110")],
)
def test_each_layer_has_experts_or_an_mlp(freq: Any, layers: str) -> None:
    found = replace(EXPERTS, moe_layer_freq=freq).layers(4)
    assert "".join(str(int(layer)) for layer in found) == layers


@pytest.mark.parametrize("freq", [0, -1, (1, 1, 1), (0, 0, 0, 0), (1, 2, 0, 0)])
def test_layers_that_are_not_there_are_refused(freq: Any) -> None:
    with pytest.raises(UserError, match="moe_layer_freq is"):
        replace(MODEL, experts=replace(EXPERTS, moe_layer_freq=freq))


def test_a_model_without_experts_is_as_before() -> None:
    dense = replace(MODEL, experts=ExpertsConfig())
    assert megatron_fields(dense, ParallelConfig(), grouped=False) == {}
    check_layout(dense, ParallelConfig())
    with pytest.raises(UserError, match="expert_model_parallel_size is 2, but the model has no"):
        check_layout(dense, ParallelConfig(expert_model_parallel_size=2))


def test_parameters_of_all_experts_and_of_those_that_a_token_meets() -> None:
    """Against sums by hand; tests/distributed compares with megatron-core's model."""
    attention = 64 * 64 * 2 + 64 * 32 * 2
    mlp, expert, shared, router = 3 * 64 * 192, 3 * 64 * 32, 3 * 64 * 48, 64 * 8
    vectors, table = 2 * 64, 256 * 64
    layer = attention + router + 8 * expert + shared
    assert MODEL.num_parameters() == 4 * (layer + vectors) + 64 + table
    assert MODEL.num_parameters(embeddings=False) == 4 * (layer + vectors) + 64
    active = attention + router + 2 * expert + shared
    assert MODEL.num_matmul_parameters() == 4 * active + table
    mixed = replace(MODEL, experts=replace(EXPERTS, moe_layer_freq=(0, 1, 1, 1)))
    dense = attention + mlp
    assert mixed.num_parameters() == 3 * layer + dense + 4 * vectors + 64 + table
    assert mixed.num_matmul_parameters() == 3 * active + dense + table


@pytest.mark.parametrize(
    ("model", "parallel", "message"),
    [
        ({"residual": "desync"}, {}, "residual desync does not go with experts: its ranks do not"),
        ({"residual": "no-comm"}, {}, "residual no-comm does not go with experts"),
        ({}, {"expert_model_parallel_size": 3}, "num_moe_experts 8 is not divisible by .* 3"),
        ({}, {"tensor_model_parallel_size": 2}, "give --parallel.sequence-parallel"),
        (
            {"experts": replace(EXPERTS, moe_shared_expert_intermediate_size=41)},
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            "moe_shared_expert_intermediate_size 41 is not divisible by .* 2",
        ),
        (
            {},
            {
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "tp_overlap": "halves",
            },
            "halves does not go with experts yet",
        ),
    ],
)
def test_layouts_that_cannot_be_are_refused(model: dict, parallel: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_layout(replace(MODEL, **model), ParallelConfig(**parallel))


def test_an_inference_engine_needs_no_sequence_parallelism() -> None:
    check_layout(MODEL, ParallelConfig(tensor_model_parallel_size=2), inference=True)


def test_experts_are_divided_over_tensor_and_data_parallel_ranks() -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=4,
    )
    check_layout(MODEL, parallel)
    assert (parallel.model_parallel_size, parallel.least_ranks) == (4, 8)
    assert parallel.data_parallel_size(16) == 4
    with pytest.raises(
        UserError, match="with experts over 4 of TP x CP x DP: start a multiple of 8"
    ):
        parallel.data_parallel_size(12)
    assert ParallelConfig(tensor_model_parallel_size=2).least_ranks == 2
    with pytest.raises(UserError, match="expert_model_parallel_size is 0"):
        ParallelConfig(expert_model_parallel_size=0)


def test_megatron_core_gets_its_own_names() -> None:
    fields = megatron_fields(
        replace(MODEL, experts=replace(EXPERTS, moe_layer_freq=2)),
        ParallelConfig(expert_model_parallel_size=2),
        grouped=True,
    )
    assert fields["moe_layer_freq"] == [1, 0, 1, 0]
    assert (fields["moe_ffn_hidden_size"], fields["expert_model_parallel_size"]) == (32, 2)
    assert fields["moe_grouped_gemm"] and fields["moe_aux_loss_coeff"] == 0.01
    none = replace(EXPERTS, moe_router_load_balancing_type="none", moe_ffn_hidden_size=None)
    fields = megatron_fields(replace(MODEL, experts=none), ParallelConfig(), grouped=False)
    assert (fields["moe_layer_freq"], fields["moe_aux_loss_coeff"]) == (1, 0.0)
    assert fields["moe_ffn_hidden_size"] == 192
