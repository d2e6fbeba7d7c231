"""Residual kinds that are there to be compared with say what they cannot be used for."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ladder.config import ParallelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.layers.attention_choice import check_attention
from pretrain.config.presets import PRESETS
from pretrain.config.train import save_config
from pretrain.convert.export import export_run
from pretrain.start.preflight import preflight


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
