"""Layers that do not know their neighbours, as Megatron-LM's own script builds them."""

from pathlib import Path

import pytest

from megatron_ladder import mcore_compat
from pretrain.loop.step import train_step
from tests.distributed.layouts import Layout, batches, configuration, micro_batches, start
from tests.ranks import run_ranks


def one_step(layout: Layout, connected: bool, megatrons_recompute: bool) -> tuple[float, float]:
    if not connected:
        mcore_compat.connect = lambda layers: None
    config = configuration("ladder", layout)
    model, optimizer, scheduler = start(config)
    if megatrons_recompute:
        for layer_config in {
            id(m.config): m.config for m in model[0].module.modules() if hasattr(m, "config")
        }.values():
            layer_config.recompute_granularity = "full"
            layer_config.recompute_method = "uniform"
            layer_config.recompute_num_layers = 1
    parts = iter(micro_batches(batches()[0], config))
    loss, norm, *_ = train_step(model, optimizer, scheduler, parts, config)
    return loss, norm


def each_way(layout: Layout) -> list[tuple[float, float]]:
    """Connected; unconnected; and unconnected with megatron-core's recomputation."""
    return [one_step(layout, *how) for how in ((True, False), (False, False), (False, True))]


@pytest.mark.parametrize("sp", [False, True])
def test_they_give_the_same_numbers(sp: bool, tmp_path: Path) -> None:
    expected, *found = run_ranks(2, each_way, Layout(tp=2, sp=sp), tmp_path=tmp_path)[0]
    assert found == [pytest.approx(expected, rel=1e-5)] * 2


def test_stages_of_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="build_gpt_model, which connects them"):
        run_ranks(2, one_step, Layout(pp=2, accumulation=4), False, False, tmp_path=tmp_path)
