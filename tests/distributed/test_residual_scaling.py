"""Learned scales on several ranks, and what residual scaling keeps for backward."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.mcore_compat import (
    build_gpt_model,
    initialize_model_parallel,
    transformer_config,
)
from pretrain.loop.step import train_step
from tests.distributed.layouts import (
    BATCH,
    LENGTH,
    Layout,
    batches,
    configuration,
    micro_batches,
    start,
)
from tests.ranks import run_ranks


def trained_scales(kind: str, layout: Layout) -> torch.Tensor:
    """All scales of this rank after some steps, from zero."""
    config = configuration(kind, layout)
    model, optimizer, scheduler = start(config)
    for tokens in batches()[:3]:
        train_step(model, optimizer, scheduler, iter(micro_batches(tokens, config)), config)
    named = model[0].module.named_parameters()
    scales = [p.detach() for name, p in named if "residual_scales" in name]
    assert len(scales) == config.model.num_layers
    return torch.cat(scales)


@pytest.mark.parametrize(
    ("kind", "sp"),
    [
        ("ladder by skipinit", True),
        ("desync by skipinit", False),
        pytest.param("ladder by skipinit", False, marks=pytest.mark.slow),
        pytest.param("parallel-ladder by skipinit", True, marks=pytest.mark.slow),
        pytest.param("standard by skipinit in halves", True, marks=pytest.mark.slow),
    ],
)
def test_ranks_have_the_same_scales(kind: str, sp: bool, tmp_path: Path) -> None:
    first, second = run_ranks(2, trained_scales, kind, Layout(tp=2, sp=sp), tmp_path=tmp_path)
    assert torch.equal(first, second)
    assert first.count_nonzero() == len(first)  # all have moved


def kept_bytes(model: ModelConfig, parallel: ParallelConfig) -> int:
    """What autograd keeps of one forward pass, without parameters."""
    (gpt,) = build_gpt_model(model, transformer_config(model, parallel))
    own = {p.untyped_storage().data_ptr() for p in gpt.parameters()}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = gpt(tokens, positions, None, labels=tokens).mean()
    assert loss.requires_grad
    return sum(kept.values())


def kept_by_scaling(kind: str) -> dict[str, int]:
    config = configuration(kind, Layout(tp=2, sp=True))
    initialize_model_parallel(config.parallel, seed=0)
    scalings = ("none", "1/n", "skipinit")
    models = {s: replace(config.model, residual_scaling=s) for s in scalings}
    return {s: kept_bytes(model, config.parallel) for s, model in models.items()}


@pytest.mark.parametrize(
    ("kind", "outputs"), [("ladder", 2), pytest.param("parallel", 1, marks=pytest.mark.slow)]
)
def test_learned_scales_keep_what_is_added(kind: str, outputs: int, tmp_path: Path) -> None:
    """As the memory plan says; numbers that are given keep nothing."""
    model = configuration(kind).model
    for found in run_ranks(2, kept_by_scaling, kind, tmp_path=tmp_path):
        assert found["1/n"] == found["none"]
        outputs_bytes = model.num_layers * outputs * BATCH * LENGTH // 2 * model.hidden_size * 4
        more = found["skipinit"] - found["none"]
        assert outputs_bytes <= more <= outputs_bytes + 8 * 2 * model.num_layers


def first_losses(kind: str) -> dict[str, float]:
    """The loss of new models on one batch."""
    given = configuration(kind)
    config = replace(given, model=replace(given.model, init_method_std=0.3))
    losses = {}
    for scaling in ("none", "1/sqrt-n", "1/n", "skipinit"):
        scaled = replace(config, model=replace(config.model, residual_scaling=scaling))
        model, optimizer, scheduler = start(scaled)
        parts = iter(micro_batches(batches()[0], scaled))
        losses[scaling], *_ = train_step(model, optimizer, scheduler, parts, scaled)
    return losses


@pytest.mark.parametrize("kind", ["standard", "parallel"])
def test_no_output_is_scaled_twice(kind: str, tmp_path: Path) -> None:
    """With "none" megatron-core draws weights that have 1/sqrt(n): at the start it is that model."""
    (found,) = run_ranks(1, first_losses, kind, tmp_path=tmp_path)
    assert found["1/sqrt-n"] == pytest.approx(found["none"], abs=1e-5)
    for other in ("1/n", "skipinit"):
        assert abs(found[other] - found["none"]) > 1e-2
