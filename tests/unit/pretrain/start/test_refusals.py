"""Residual kinds that are there to be compared with say what they cannot be used for."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ladder.config import ParallelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.layers.attention_choice import check_attention
from pretrain.config.presets import PRESETS
from pretrain.config.train import TrainConfig, save_config
from pretrain.convert.export import export_run
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


def test_local_layers_have_no_attention_of_transformer_engine() -> None:
    check_attention("auto", "local")
    check_attention("te", "transformer_engine")
    with pytest.raises(UserError, match="attention te is Transformer Engine's"):
        check_attention("te", "local")
