"""`bench plan`'s set-up and table: FP8 counts in memory as in `train`, and columns stay apart."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ladder.config import ParallelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.fp8 import Fp8Config
from pretrain.config.presets import PRESETS
from pretrain.plan.links import NVLINK
from pretrain.plan.memory import memory_plan
from pretrain.plan.planner import DEVICES, Hardware
from pretrain.plan.search import layouts, row
from pretrain.plan.table import PlanOptions, laid_out, setup, table


def test_fp8_counts_in_memory_as_in_train() -> None:
    """8B at TP 2: with FP8's copies of the weights a layout that fits in bf16 may not fit."""
    given = replace(PRESETS["llama-3-8b"](), parallel=ParallelConfig(2, sequence_parallel=True))
    found = {}
    for fp8 in (False, True):
        config, hardware = setup(PlanOptions("llama-3-8b", 8, fp8=fp8))
        assert hardware.fp8 == fp8
        found[fp8] = row(replace(config, parallel=given.parallel), 8, hardware)
        chosen = laid_out(config, found[fp8])
        assert chosen.fp8.recipe == ("tensorwise" if fp8 else None)
        assert found[fp8].memory_gb == memory_plan(chosen, 4).total / 1e9
    as_train = replace(given, fp8=Fp8Config("tensorwise"))
    assert found[True].memory_gb == memory_plan(as_train, 4).total / 1e9
    copies = 2 * 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) / 2
    assert memory_plan(as_train, 4).fp8_weights == pytest.approx(copies, rel=1e-4)  # norms too
    assert found[True].memory_gb > found[False].memory_gb
    assert found[True].step_s < found[False].step_s


def test_sizes_that_fp8_cannot_have_are_no_layouts() -> None:
    """4,128 tokens over 4 ranks are 129 times 8; over 8 ranks they are no multiple of 8."""
    options = PlanOptions("llama-3-8b", 8, seq_length=4128)
    for fp8, sizes in ((False, {1, 2, 4, 8}), (True, {1, 2, 4})):
        config, _ = setup(replace(options, fp8=fp8))
        one = [c for c in layouts(config, 8) if c.micro_batch_size == 1]
        assert {c.parallel.tensor_model_parallel_size for c in one} == sizes
    with pytest.raises(UserError, match="is not a multiple of 16"):
        setup(PlanOptions("llama-3-8b", 8, seq_length=4100, fp8=True))


def test_a_layout_that_standard_cannot_have_stays_apart_from_its_neighbour() -> None:
    config, _ = setup(PlanOptions("llama-3-8b", 8))
    hardware = Hardware(DEVICES["h100"], NVLINK)
    of = {
        kind: row(
            replace(
                *(config,),
                model=replace(config.model, residual=kind),
                parallel=ParallelConfig(tp, sequence_parallel=tp > 1),
            ),
            *(8, hardware),
        )
        for kind, tp in (("standard", 1), ("ladder", 4))
    }
    title, standard, ladder = table({kind: [r] for kind, r in of.items()}, 1).splitlines()
    assert len(title) == len(standard) == len(ladder)
    assert standard.split()[-2:] == ["1.000", "1.000"]
    assert ladder.split()[-3:] == ["does", "not", "fit"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"global_batch_size": 0}, "--global-batch-size"),
        ({"storage_gb_per_s": math.nan}, "--storage-gb-per-s"),
        ({"network_gbit_per_s": math.inf}, "--network-gbit-per-s"),
        ({"png": Path()}, "--png . is no file"),
        (
            {"json": Path("nowhere/a.json")},
            "--json nowhere/a.json is no file in a folder that exists",
        ),
    ],
)
def test_options_are_refused_before_the_work(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        setup(PlanOptions("debug", 1, **options))
