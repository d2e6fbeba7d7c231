"""Residual kinds that are there to be compared with say what they cannot be used for."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ladder.config import ParallelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.fp8 import Fp8Config
from megatron_ladder.layers.attention.choice import check_attention
from pretrain.config.presets import PRESETS
from pretrain.config.train import TrainConfig, save_config
from pretrain.convert.export import export_run
from pretrain.plan.estimate import estimate, hardware_of
from pretrain.plan.memory import memory_plan
from pretrain.plan.search import row
from pretrain.plan.table import PlanOptions, setup
from pretrain.start.preflight import preflight
from tests.data_sets import write_data_set


def with_residual(residual: str, tp: int = 1):
    base = PRESETS["debug"]()
    return replace(
        base,
        model=replace(base.model, residual=residual),
        parallel=ParallelConfig(tensor_model_parallel_size=tp),
    )


def test_no_comm_is_not_trained() -> None:
    with pytest.raises(UserError, match="for measurements of speed only"):
        preflight(with_residual("no-comm"), 1)


def in_halves(residual: str, tp: int, micro_batch_size: int) -> TrainConfig:
    base = PRESETS["debug"]()
    return replace(
        base,
        model=replace(base.model, residual=residual),
        parallel=ParallelConfig(tensor_model_parallel_size=tp, tp_overlap="halves"),
        micro_batch_size=micro_batch_size,
    )


def test_halves_of_a_micro_batch_are_equal() -> None:
    in_halves("standard", 2, 4)
    for odd in (1, 3):
        with pytest.raises(
            UserError, match=f"micro_batch_size {odd} has no two equal halves, .* even"
        ):
            in_halves("standard", 2, odd)


@pytest.mark.parametrize(
    ("residual", "tp"),
    [("standard", 1), ("ladder", 2), ("parallel-ladder", 2), ("desync", 2)],
)
def test_halves_are_of_layers_that_would_wait(residual: str, tp: int, tmp_path: Path) -> None:
    data = write_data_set(tmp_path / "data")
    config = in_halves(residual, tp, 2)
    config = replace(config, data=replace(config.data, paths=(data,)))
    with pytest.raises(UserError, match=f"model.residual is {residual}, .*size {tp}. Leave it out"):
        preflight(config, tp)


def test_desync_of_several_ranks_is_not_exported(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run/checkpoints/step_00000001"
    checkpoint.mkdir(parents=True)
    save_config(with_residual("desync", tp=2), checkpoint / "config.json")
    with pytest.raises(UserError, match="desync-2 at tensor-parallel size 2: its weights"):
        export_run(checkpoint, tmp_path / "out", None, "5GB")
    assert not (tmp_path / "out").exists()


EXPERTS = PRESETS["tiny-experts"]()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compile": True, "parallel": ParallelConfig()}, "--compile: experts are not compiled"),
        ({"cuda_graph": True, "parallel": ParallelConfig()}, "--cuda-graph: experts in a graph"),
        (
            {"model": replace(EXPERTS.model, residual="desync")},
            "model.residual desync does not go with experts",
        ),
    ],
)
def test_what_experts_cannot_do_yet_is_refused_before_ranks_start(
    change: dict, message: str, tmp_path: Path
) -> None:
    data = write_data_set(tmp_path / "data")
    config = replace(EXPERTS, data=replace(EXPERTS.data, paths=(data,)), **change)
    with pytest.raises(UserError, match=message):
        preflight(config, 2)


@pytest.mark.parametrize(
    ("fp8", "sizes", "message"),
    [
        (
            Fp8Config("delayed"),
            {},
            "recipe delayed does not go with experts yet: give one of",
        ),
        (Fp8Config("tensorwise", primary_weights=True), {}, "with fp8.primary_weights does not go"),
        (Fp8Config("blockwise"), {"moe_ffn_hidden_size": 24}, "moe_ffn_hidden_size, 24, is not a"),
        (
            Fp8Config("tensorwise"),
            {"moe_shared_expert_intermediate_size": 40},
            "moe_shared_expert_intermediate_size of a rank, 40, is not a multiple of 16",
        ),
    ],
)
def test_what_experts_cannot_do_in_fp8_is_refused(
    fp8: Fp8Config, sizes: dict, message: str
) -> None:
    replace(EXPERTS, fp8=Fp8Config("tensorwise"), precision="bf16")
    model = replace(EXPERTS.model, experts=replace(EXPERTS.model.experts, **sizes))
    with pytest.raises(UserError, match=message):
        replace(EXPERTS, model=model, fp8=fp8, precision="bf16")


def test_experts_are_planned_or_estimated_by_an_mfu() -> None:
    vocabulary = replace(EXPERTS.model, vocab_size=1000)
    config = replace(EXPERTS, model=vocabulary, precision="bf16")
    hardware = hardware_of("h100")
    planned = estimate(config, ranks=2, hardware=hardware)
    assert planned.memory_bytes == memory_plan(config, 2).total
    assert "the planner's model" in planned.step_source
    assert planned.step_s == row(config, 2, hardware).step_s
    with pytest.raises(UserError, match="in bf16, not standard in fp32: give an MFU"):
        estimate(replace(config, precision="fp32"), ranks=2, hardware=hardware)
    found = estimate(config, ranks=2, hardware=hardware, mfu=0.4)
    assert found.parameters == vocabulary.num_parameters()
    flops = 6 * vocabulary.num_matmul_parameters() + 12 * 6 * 128 * 256
    assert found.step_s == pytest.approx(8 * 256 * flops / (2 * 989e12 * 0.4))
    with pytest.raises(UserError, match="--fp8 does not go with the experts"):
        setup(PlanOptions("tiny-experts", 8, fp8=True))


def test_local_layers_have_no_attention_of_transformer_engine() -> None:
    check_attention("auto", "local")
    check_attention("te", "transformer_engine")
    with pytest.raises(UserError, match="attention te is Transformer Engine's"):
        check_attention("te", "local")
    with pytest.raises(UserError, match="documents apart over context-parallel ranks"):
        check_attention("te", "transformer_engine", documents_divided=True)
