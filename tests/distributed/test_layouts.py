"""Every layout trains as the unsharded oracle does, in fp32: losses of six steps, every parameter's
gradient at the first; and a checkpoint moves from each layout to the next.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ladder.hf.convert import megatron_to_hf
from pretrain.run.checkpoint import load_weights
from tests.distributed.layouts import (
    HALVES,
    KINDS,
    Layout,
    batches,
    configuration,
    run_layouts,
    save_start,
)
from tests.gradients import assert_same_gradients
from tests.oracle import loss, plain_model, train_losses
from tests.ranks import run_ranks

# fp32 sums in another order. What exchanging two residual reads of one layer changes is held to be
# 100 times these, in `test_the_tolerances_see_one_exchanged_read`.
LOSS_TOLERANCE = 2e-5

RECOMPUTE = ("none", "selective", "full")
LAYOUTS = [
    *(Layout(recompute=r, accumulation=a) for r, a in itertools.product(RECOMPUTE, (1, 4))),
    *(Layout(tp=2, recompute=r) for r in RECOMPUTE),
    *(Layout(tp=2, sp=True, recompute=r) for r in RECOMPUTE),
    Layout(tp=2, accumulation=4),
    Layout(tp=2, sp=True, accumulation=4),
    Layout(pp=2, accumulation=4),
    Layout(pp=2, first=3, accumulation=4, recompute="full"),
    Layout(pp=2, vpp=2, accumulation=4),
    Layout(dp=2),
    Layout(dp=2, accumulation=4),
    Layout(tp=4),
    Layout(tp=4, sp=True, accumulation=4),
    Layout(pp=4, accumulation=4),
    Layout(tp=2, pp=2, accumulation=4),
    Layout(tp=2, dp=2),
    Layout(pp=2, dp=2, accumulation=4),
    Layout(tp=2, sp=True, pp=2, vpp=2, accumulation=4),
    Layout(tp=2, sp=True, pp=2, vpp=2, accumulation=4, recompute="full"),
    *(Layout(cp=2, recompute=r, accumulation=4) for r in RECOMPUTE),
    Layout(cp=4),
    Layout(tp=2, cp=2),
    *(Layout(tp=2, sp=True, cp=2, recompute=r) for r in RECOMPUTE),
    Layout(cp=2, dp=2, accumulation=2),
    Layout(pp=2, cp=2, accumulation=4),
    Layout(pp=2, vpp=2, cp=2, accumulation=4, recompute="full"),
]
# desync depends on the tensor-parallel size (it is trained at 2 here) and has no sequence parallelism.
DESYNC_LAYOUTS = [
    Layout(tp=2),
    Layout(tp=2, recompute="full"),
    Layout(tp=2, pp=2, accumulation=4),
    Layout(tp=2, dp=2),
    Layout(tp=2, pp=2, vpp=2, accumulation=4),
    Layout(tp=2, cp=2),
]


# In each run: every axis, and what has all collectives and both boundaries of stages in it. The slow run
# has all layouts, of all kinds.
SOME_LAYOUTS = [
    Layout(accumulation=4),
    Layout(tp=2, recompute="selective"),
    Layout(tp=2, sp=True, recompute="full"),
    Layout(pp=2, accumulation=4),
    Layout(pp=2, vpp=2, accumulation=4),
    Layout(dp=2, accumulation=4),
    Layout(cp=2, accumulation=4),
    Layout(tp=2, sp=True, pp=2, vpp=2, accumulation=4, recompute="full"),
    Layout(tp=2, sp=True, cp=2, recompute="full"),
]
FEW_LAYOUTS = [
    Layout(tp=2, sp=True, recompute="full"),
    Layout(tp=2, sp=True, pp=2, vpp=2, accumulation=4),
]
# Halves of a micro-batch hide what tensor parallelism sums. On one rank the model runs whole, so a
# checkpoint moves from whole micro-batches to halves.
FEW_HALVES_LAYOUTS = [
    Layout(dp=2),
    Layout(tp=2, sp=True, pp=2, vpp=2, accumulation=4, recompute="full"),
]
# Where a learned scale's gradient is complete on each rank, and where it is a part; a stage's last output,
# which the next one adds.
FEW_SCALED_LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(tp=2, sp=True, recompute="full"),
    Layout(pp=2, accumulation=4),
    Layout(cp=2),
]
FEW_DESYNC_LAYOUTS = [
    Layout(tp=2, recompute="full"),
    Layout(tp=2, dp=2),
    Layout(tp=2, pp=2, vpp=2, accumulation=4),
]
# megatron-core's own layer, over which the ranks of a stage divide the sequences.
FEW_CONTEXT_LAYOUTS = [
    Layout(cp=2, recompute="selective"),
    Layout(pp=2, cp=2, accumulation=4),
    Layout(cp=2, dp=2, recompute="full"),
]
IN_EACH_RUN = {
    "ladder": SOME_LAYOUTS,
    "standard": FEW_CONTEXT_LAYOUTS,
    "list": FEW_LAYOUTS,
    "desync": FEW_DESYNC_LAYOUTS,
    "some parallel-ladder": FEW_LAYOUTS,
    "windows, yarn": [Layout(cp=2), FEW_LAYOUTS[0]],
    "standard in halves": FEW_HALVES_LAYOUTS,
    "ladder by skipinit": FEW_SCALED_LAYOUTS,
    "ladder without norms": FEW_SCALED_LAYOUTS[2:3],
}


def all_layouts(kind: str) -> list[Layout]:
    """By the number of their ranks, as each number is a run of its own."""
    layouts = DESYNC_LAYOUTS if kind.startswith("desync") else LAYOUTS
    if kind in HALVES:
        layouts = [layout for layout in layouts if layout.tp > 1]
    return sorted(layouts, key=lambda layout: layout.ranks)


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        *(pytest.param(kind, layouts, id=kind) for kind, layouts in IN_EACH_RUN.items()),
        *(
            pytest.param(kind, all_layouts(kind), id=f"{kind}-all", marks=pytest.mark.slow)
            for kind in (*KINDS, *HALVES)
        ),
    ],
)
def test_every_layout_trains_as_the_oracle(
    kind: str, layouts: list[Layout], tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    run_ranks(1, save_start, kind, weights, tmp_path=tmp_path)
    config = configuration(kind)
    plain = plain_model(config.model, weights)
    tp = layouts[0].tp
    *steps, held_out = batches()
    # Six steps, and one more after the checkpoint has moved.
    expected, gradients = train_losses(plain, config, tp, [*steps, steps[0]])
    expected = expected[:-1]
    assert expected[-1] < expected[0] - 0.1
    a_step_later = loss(plain, config.model, tp, held_out).item()

    before, last = None, None
    for ranks, group in itertools.groupby(layouts, key=lambda layout: layout.ranks):
        group = list(group)
        folder = tmp_path / f"{ranks} ranks"
        by_rank = run_ranks(
            ranks, run_layouts, kind, group, weights, before, folder, tmp_path=tmp_path
        )
        for number, layout in enumerate(group):
            for result in (results[number] for results in by_rank):
                torch.testing.assert_close(
                    torch.tensor(result["losses"]),
                    torch.tensor(expected),
                    atol=LOSS_TOLERANCE,
                    rtol=0,
                    msg=lambda m, layout=layout: f"{layout}: {m}",
                )
            found = megatron_to_hf(load_weights(folder / str(number) / "gradients"), plain.config)
            assert_same_gradients(found, gradients, layout)
            result = by_rank[0][number]
            if last is not None:
                moved = result["validation of the layout before"]
                assert moved == pytest.approx(last, abs=LOSS_TOLERANCE), f"into {layout}"
                later = result["validation a step later"]
                assert later == pytest.approx(a_step_later, abs=LOSS_TOLERANCE), f"into {layout}"
                assert abs(later - moved) > 20 * LOSS_TOLERANCE
            before, last = result["checkpoint"], result["validation"]


def test_the_tolerances_see_one_exchanged_read(tmp_path: Path) -> None:
    """One layer of eight that reads as a standard layer does, in a ladder model."""
    weights = tmp_path / "weights"
    run_ranks(1, save_start, "ladder", weights, tmp_path=tmp_path)
    model = configuration("ladder").model
    two = batches()[:2]  # the steps of a layout read both in turn
    plain = plain_model(model, weights)
    right = [loss(plain, model, 1, tokens) for tokens in two]
    for layer in range(1, model.num_layers):  # in the first the two kinds read the same
        others = tuple(i for i in range(model.num_layers) if i != layer)
        wrong = replace(model, ladder_layers=others)
        plain = plain_model(wrong, weights)
        pairs = zip(two, right, strict=True)
        differences = [abs(loss(plain, wrong, 1, tokens) - loss_of) for tokens, loss_of in pairs]
        assert max(differences) > 100 * LOSS_TOLERANCE, layer
