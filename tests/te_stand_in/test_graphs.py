"""Transformer Engine's Python in a graph of forward and backward: what it holds from step to step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ladder.config import ParallelConfig
from megatron_ladder.fp8 import Fp8Config, Fp8Recipe
from pretrain.config.train import TrainConfig
from tests.graph_run import both, config
from tests.ranks import run_ranks
from tests.te_stand_in import MARKS

pytestmark = MARKS
RECIPES: tuple[Fp8Recipe | None, ...] = (None, "tensorwise", "delayed", "blockwise")


def in_precision(residual: str, recipe: Fp8Recipe | None, **changes: Any) -> TrainConfig:
    return config(residual, precision="bf16", fp8=Fp8Config(recipe=recipe), **changes)


def on_stand_in_kernels(configs: dict[str, TrainConfig]) -> dict[str, Any]:
    from tests.te_stand_in import kernels

    kernels.install()
    return both(configs)


@pytest.mark.parametrize("residual", ["ladder", "standard"])
def test_replayed_steps_train_alike(residual: str, tmp_path: Path) -> None:
    cases = {str(recipe): in_precision(residual, recipe) for recipe in RECIPES}
    (found,) = run_ranks(1, on_stand_in_kernels, cases, tmp_path=tmp_path)
    assert not any(found.values()), found


@pytest.mark.parametrize(("overlap", "recipes"), [("none", RECIPES), ("halves", RECIPES[1:3])])
def test_replayed_steps_train_alike_under_sequence_parallelism(
    overlap: Any, recipes: tuple[Fp8Recipe | None, ...], tmp_path: Path
) -> None:
    cases = {}
    for recipe in recipes:
        parallel = ParallelConfig(
            tensor_model_parallel_size=2, sequence_parallel=True, tp_overlap=overlap
        )
        residual = "standard" if overlap == "halves" else "ladder"
        given = in_precision(residual, None, parallel=parallel)
        if recipe == "blockwise":  # whole blocks of a rank's tokens and of the width
            model = replace(given.model, hidden_size=128, ffn_hidden_size=256)
            given = replace(given, model=model, data=replace(given.data, seq_length=128))
        cases[str(recipe)] = replace(given, fp8=Fp8Config(recipe=recipe))
    for found in run_ranks(2, on_stand_in_kernels, cases, tmp_path=tmp_path):
        assert not any(found.values()), found
