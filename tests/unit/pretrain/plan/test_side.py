from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.fp8 import Fp8Config
from megatron_ladder.side.config import SideConfig, check_side
from pretrain.config.presets import PRESETS
from pretrain.config.side import check_side_layout
from pretrain.config.train import AdaptConfig, TrainConfig
from pretrain.plan.memory import activation_bytes, memory_plan, stage_parameters
from pretrain.plan.side import side_parameters, with_side_network


@pytest.fixture
def model() -> ModelConfig:
    return replace(PRESETS["llama-3-8b"]().model, residual="ladder")


@pytest.fixture
def config(model: ModelConfig) -> TrainConfig:
    config = PRESETS["side-tune"]()
    return replace(config, model=model, data=replace(config.data, seq_length=2048))


def test_the_paper_drops_every_fourth_layer() -> None:
    assert SideConfig(8, 4).kept_layers(12) == (1, 2, 3, 5, 6, 7, 9, 10, 11)
    assert SideConfig(8, (0, 11)).kept_layers(12) == tuple(range(1, 11))
    assert SideConfig(8).kept_layers(3) == (0, 1, 2)


def test_the_parameters_by_hand(model: ModelConfig) -> None:
    """A block: attention h' (32 + 8) 2 d', MLP 3 h' f', two norms; a gate and a down-projection."""
    h, small, d, f = 4096, 512, 16, 1792
    block = small * (32 + 8) * 2 * d + 3 * small * f + 2 * small
    expected = 24 * (block + h * small + 1) + 2 * h * small
    assert SideConfig(8, 4).num_parameters(model) == expected


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 4)])
def test_ranks_hold_the_side_network_together(config: TrainConfig, tp: int, pp: int) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    config = replace(config, parallel=parallel)
    mine = [side_parameters(config, stage, 32 // pp) for stage in range(pp)]
    blocks = 32 * config.side.block_parameters(config.model)
    assert sum(mine) == config.side.num_parameters(config.model) - blocks * (1 - 1 / tp)


def test_memory_by_hand(config: TrainConfig) -> None:
    config = replace(config, side=replace(config.side, start="magnitude"))
    plan = memory_plan(config, dp=4)
    whole, _ = stage_parameters(config, 0)
    side = config.side.num_parameters(config.model)
    assert plan.weights == 2 * (whole + side)
    assert plan.gradients == 4 * side
    assert plan.optimizer == 12 * side / 4
    blocks = activation_bytes(
        config.side.model(config.model),
        tokens=2048,
        seq_length=2048,
        tp=1,
        sp=False,
        recompute="none",
    )
    assert plan.activations == 32 * (blocks + 2 * 2048 * 4096)
    full = memory_plan(replace(config, side=SideConfig(), init_from=None), dp=4)
    assert plan.total < full.total / 3
    # The backward through the backbone at the start keeps what training it would keep.
    pruned = memory_plan(replace(config, side=replace(config.side, start="fisher")), dp=4)
    assert pruned.activations == full.activations > plan.activations


def test_the_operations_of_a_token(config: TrainConfig) -> None:
    """The backbone's forward, its head's backward to the state, and the side network."""
    side = config.side.num_parameters(config.model)
    found = with_side_network(config, 600.0, 100.0)
    head = 2 * config.model.padded_vocab_size * 4096
    assert found == 200 + head + 6 * side + 12 * 32 * 512 * 100


@pytest.mark.parametrize(
    ("side", "changes", "said"),
    [
        (SideConfig(0), {}, "at least 1"),
        (SideConfig(3), {}, "does not divide"),
        (SideConfig(128), {}, "even number"),
        (SideConfig(8, 1), {}, "N of 2 or more"),
        (SideConfig(8, (32,)), {}, "numbered 0 to 31"),
        (SideConfig(8), {"residual": "desync"}, "desync"),
        (SideConfig(8), {"sliding_window": 64}, "sliding window"),
        (SideConfig(dropped_layers=4), {}, "there is none"),
    ],
)
def test_what_a_model_cannot_have(
    side: SideConfig, changes: dict, said: str, model: ModelConfig
) -> None:
    with pytest.raises(UserError, match=said):
        check_side(side, replace(model, **changes))


@pytest.mark.parametrize(
    ("side", "layout", "said"),
    [
        (SideConfig(8), {"tensor_model_parallel_size": 1024}, "does not divide"),
        (SideConfig(8, tuple(range(16, 32))), {"pipeline_model_parallel_size": 2}, "16 to 31"),
        (
            SideConfig(8, (8, 9, 10, 11)),
            {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2},
            "8 to 11",
        ),
    ],
)
def test_what_a_layout_cannot_cut(
    side: SideConfig, layout: dict, said: str, model: ModelConfig
) -> None:
    with pytest.raises(UserError, match=said):
        check_side_layout(side, model, ParallelConfig(**layout))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recompute": "full"}, "recompute"),
        ({"fp8": Fp8Config(recipe="tensorwise")}, "FP8"),
        ({"compile": True}, "--compile"),
        ({"cuda_graph": True}, "--cuda-graph"),
        ({"init_from": Path("a"), "adapt": AdaptConfig(distillation_weight=0.5)}, "does not adapt"),
    ],
)
def test_what_a_run_cannot_have(config: TrainConfig, changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(config, **changes)
