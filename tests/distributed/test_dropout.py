"""Dropout under tensor parallelism: shared states drop alike, each rank's heads on their own, and
recomputation drops what the forward pass dropped.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from pretrain.loop.step import train_step
from tests.distributed.layouts import Layout, batches, configuration, micro_batches, start
from tests.ranks import run_ranks


def one_step(kind: str, layout: Layout) -> dict:
    """Loss and gradient norm of the first step, and what the ranks should, or should not, share."""
    config = configuration(kind, layout)
    dropped = replace(config.model, hidden_dropout=0.2, attention_dropout=0.2)
    config = replace(config, model=dropped)
    model, optimizer, scheduler = start(config)
    states = {k: v.clone() for k, v in get_cuda_rng_tracker().get_states().items()}
    parts = iter(micro_batches(batches()[0], config))
    loss, norm, *_ = train_step(model, optimizer, scheduler, parts, config)
    # A second micro-batch draws other numbers: were recomputation to put states back wrongly, this
    # step's would differ.
    parts = iter(micro_batches(batches()[1], config))
    second, second_norm, *_ = train_step(model, optimizer, scheduler, parts, config)
    shared = {n: p.detach() for n, p in model[0].module.named_parameters() if "norm" in n}
    return {"numbers": (loss, norm, second, second_norm), "shared": shared, "states": states}


def a_step_of_each(kind: str, layouts: list[Layout]) -> list[dict]:
    return [one_step(kind, layout) for layout in layouts]


@pytest.mark.parametrize(
    ("kind", "sp"),
    [
        ("standard", False),
        ("parallel-ladder", False),
        ("ladder", True),
        pytest.param("standard", True, marks=pytest.mark.slow),
        pytest.param("parallel", False, marks=pytest.mark.slow),
        pytest.param("parallel", True, marks=pytest.mark.slow),
        pytest.param("parallel-ladder", True, marks=pytest.mark.slow),
        pytest.param("ladder", False, marks=pytest.mark.slow),
        ("standard in halves", True),
        pytest.param("standard in halves", False, marks=pytest.mark.slow),
        pytest.param("parallel in halves", True, marks=pytest.mark.slow),
        pytest.param("parallel in halves", False, marks=pytest.mark.slow),
    ],
)
def test_dropout(kind: str, sp: bool, tmp_path: Path) -> None:
    plain = Layout(tp=2, sp=sp, accumulation=2)
    layouts = [plain, *(replace(plain, recompute=r) for r in ("selective", "full"))]
    (first, *others), (second, *_) = run_ranks(2, a_step_of_each, kind, layouts, tmp_path=tmp_path)
    for layout, again in zip(layouts[1:], others, strict=True):
        assert again["numbers"] == pytest.approx(first["numbers"], rel=1e-5), layout
    for name, parameter in first["shared"].items():
        torch.testing.assert_close(parameter, second["shared"][name], atol=0, rtol=0, msg=name)
    assert not torch.equal(
        first["states"]["model-parallel-rng"], second["states"]["model-parallel-rng"]
    )
