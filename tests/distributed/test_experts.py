"""Mixtures of experts train as plain PyTorch does, in fp32, at every layout: losses of six steps, every
parameter's gradient at the first; and a checkpoint moves from each layout to the next.
"""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.model.routers import biases_of, load_balance, routers_of
from pretrain.run.checkpoint import load_weights
from tests.distributed.expert_balance import LAYOUTS as CUTS
from tests.distributed.expert_balance import differences
from tests.distributed.layouts import (
    BATCH,
    FOUR,
    OF_EXPERTS,
    Layout,
    batches,
    configuration,
    load_start,
    micro_batches,
    run_layouts,
    save_start,
    save_weights,
    start,
    train_step,
)
from tests.expert_oracle import BIAS, Cut, Oracle
from tests.gradients import assert_same_gradients
from tests.ranks import run_ranks

LOSS_TOLERANCE = 2e-5
# Of kinds whose numbers depend on how the batch is cut, all layouts of a list cut it alike: here in whole
# sequences, two to a micro-batch.
LAYOUTS = [
    Layout(accumulation=4),
    Layout(accumulation=4, recompute="full"),
    Layout(dp=2, accumulation=2),
    Layout(dp=2, ep=2, accumulation=2),
    Layout(pp=2, accumulation=4),
    Layout(dp=4, ep=4),
    Layout(dp=4, ep=2),
    Layout(pp=2, dp=2, ep=2, accumulation=2),
    Layout(pp=2, vpp=2, dp=2, ep=2, accumulation=2, recompute="selective"),
]
# Of context-parallel ranks each has two pieces of each sequence, and sends its tokens by itself.
WITH_CP = [
    Layout(cp=2, accumulation=4),
    Layout(cp=2, ep=2, accumulation=4),
    Layout(cp=2, dp=2, ep=4, accumulation=2),
    Layout(cp=2, tp=2, sp=True, ep=2, accumulation=4),
]
# The ranks of a sequence each have a part of it.
WITH_TP = [
    Layout(tp=2, sp=True, accumulation=4),
    Layout(tp=2, sp=True, ep=2, accumulation=4, recompute="full"),
    Layout(tp=2, sp=True, dp=2, accumulation=2),
    Layout(tp=2, sp=True, dp=2, ep=2, accumulation=2),
    Layout(tp=2, sp=True, dp=2, ep=4, accumulation=2),
    Layout(tp=2, sp=True, pp=2, ep=2, accumulation=4),
    Layout(tp=2, sp=True, pp=2, vpp=2, accumulation=4),
]
IN_EACH_RUN = {
    "experts": [LAYOUTS[0], LAYOUTS[3], WITH_TP[4], WITH_CP[1]],
    "a shared expert": [WITH_TP[1]],
    "capacity": [WITH_TP[1]],
    "expert bias": [WITH_TP[1], LAYOUTS[0]],
    "one expert, some MLPs": [LAYOUTS[3]],
    "experts in the first half": [LAYOUTS[3], LAYOUTS[7]],  # the second stage has none
    "ladder, experts": [LAYOUTS[3], WITH_TP[1], WITH_CP[1]],
    "ladder, a shared expert": [LAYOUTS[7], WITH_TP[5]],
    "ladder, capacity, padded": [WITH_TP[3]],
    "hybrid, a shared expert": [WITH_TP[1]],
    "parallel, a shared expert": [WITH_TP[1]],
    "parallel-ladder experts without norms": [LAYOUTS[7]],
}


def cut_of(layout: Layout) -> Cut:
    return Cut(BATCH // layout.dp // layout.accumulation, layout.tp)


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        *(pytest.param(kind, layouts, id=kind) for kind, layouts in IN_EACH_RUN.items()),
        *(
            pytest.param(kind, layouts, id=f"{kind}-{name}", marks=pytest.mark.slow)
            for kind in OF_EXPERTS
            for name, layouts in (("all", LAYOUTS), ("all with TP", WITH_TP))
        ),
        # Kinds that do not depend on how sequences are cut: the oracle does not cut them as CP does.
        *(
            pytest.param(kind, WITH_CP, id=f"{kind}-all with CP", marks=pytest.mark.slow)
            for kind in ("experts", "expert bias", "ladder, experts", "parallel-ladder, experts")
        ),
    ],
)
def test_every_layout_trains_as_the_oracle(
    kind: str, layouts: list[Layout], tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    run_ranks(1, save_start, kind, weights, tmp_path=tmp_path)
    config = configuration(kind)
    saved = load_weights(weights)
    *steps, held_out = batches()
    before: Path | None = None
    last, the_one_before = 0.0, Oracle(config, saved)
    for number, (ranks, group) in enumerate(
        itertools.groupby(layouts, lambda layout: layout.ranks)
    ):
        group = list(group)
        folder = tmp_path / f"group {number}"
        by_rank = run_ranks(
            ranks, run_layouts, kind, group, weights, before, folder, tmp_path=tmp_path
        )
        for place, layout in enumerate(group):
            oracle, cut = Oracle(config, saved), cut_of(layout)
            expected, (gradients, *_) = zip(
                *(oracle.step(batch, cut) for batch in steps), strict=True
            )
            assert expected[-1] < expected[0] - 0.1
            for result in (results[place] for results in by_rank):
                torch.testing.assert_close(
                    torch.tensor(result["losses"]),
                    torch.tensor(expected),
                    atol=LOSS_TOLERANCE,
                    rtol=0,
                    msg=lambda m, layout=layout: f"{layout}: {m}",
                )
            found = load_weights(folder / str(place) / "gradients")
            assert {n for n in found if BIAS not in n} == set(gradients)
            assert_same_gradients(found.items(), gradients, layout)
            result = by_rank[0][place]
            if before is not None:
                moved = result["validation of the layout before"]
                assert moved == pytest.approx(last, abs=LOSS_TOLERANCE), f"into {layout}"
                the_one_before.step(steps[0], cut)
                a_step_later = the_one_before.losses(held_out, cut)[0].item()
                found_later = result["validation a step later"]
                assert found_later == pytest.approx(a_step_later, abs=LOSS_TOLERANCE), (
                    f"into {layout}"
                )
                assert abs(found_later - moved) > 20 * LOSS_TOLERANCE
            before, last, the_one_before = result["checkpoint"], result["validation"], oracle


def first_weights(layout: Layout, folder: Path) -> None:
    model, _, _ = start(configuration("a shared expert", layout))
    save_weights(model, folder)


def test_the_first_weights_are_those_of_every_layout(tmp_path: Path) -> None:
    """Without a GPU: no two experts are alike, and each is the same wherever it is."""
    layouts = [Layout(), Layout(dp=2, ep=2), Layout(tp=2, sp=True, ep=2), Layout(dp=4, ep=4)]
    found: list[dict[str, Tensor]] = []
    for number, layout in enumerate(layouts):
        folder = tmp_path / str(number)
        run_ranks(layout.ranks, first_weights, layout, folder, tmp_path=tmp_path)
        found.append(load_weights(folder))
    first = found[0][
        "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    ]  # [layers, experts, ...]
    assert len({tuple(e.flatten()[:4].tolist()) for e in first.flatten(0, 1)}) == 4 * 4
    std = found[0]["decoder.layers.mlp.experts.experts.linear_fc2.weight"].std()
    assert std == pytest.approx(0.1 / 8**0.5, rel=0.05)
    for other, layout in zip(found[1:], layouts[1:], strict=True):
        assert other.keys() == found[0].keys()
        for name, weight in found[0].items():
            assert torch.equal(other[name], weight), (layout, name)


def count_and_skip(
    layout: Layout, kind: str, weights: Path
) -> tuple[dict[str, float], list[int], bool]:
    """What is counted in a step, each expert's tokens by this rank's count, and whether a step that does
    not count leaves the biases alone."""
    config = configuration(kind, layout)
    model, optimizer, scheduler = start(config)
    load_start(model, weights)
    tokens = batches()[0]
    counted = []

    def is_good(*_: object) -> bool:
        counted.extend(int(r.tokens_chosen.sum()) for r in routers_of(model))
        return False

    before = [bias.clone() for bias, _ in biases_of(model)]
    parts = iter(micro_batches(tokens, config))
    train_step(model, optimizer, scheduler, parts, config, is_good=is_good)
    same = [torch.equal(a, b) for a, (b, _) in zip(before, biases_of(model), strict=True)]
    balance = load_balance(model, config.model.num_layers)
    assert load_balance(model, config.model.num_layers) == {}, "counted anew"
    return balance, counted, all(same)


@pytest.mark.parametrize("kind", ["capacity", "expert bias"])
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(recompute="full"), marks=pytest.mark.slow),
        Layout(tp=2, sp=True, ep=2, recompute="full"),
        pytest.param(Layout(pp=2, dp=2, ep=2, accumulation=2), marks=pytest.mark.slow),
    ],
)
def test_the_balance_is_that_of_all_tokens(kind: str, layout: Layout, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    run_ranks(1, save_weights_of, kind, weights, tmp_path=tmp_path)
    oracle = Oracle(configuration(kind), load_weights(weights))
    oracle.losses(batches()[0], cut_of(layout))
    uneven = max((c.max() / c.mean()).item() for c in oracle.chosen.values())
    choices = sum(c.sum().item() for c in oracle.chosen.values())
    found = run_ranks(layout.ranks, count_and_skip, layout, kind, weights, tmp_path=tmp_path)
    for balance, counted, biases_stay in found:
        assert biases_stay
        assert balance["expert_imbalance"] == pytest.approx(uneven)
        assert balance["dropped_share"] == pytest.approx(oracle.dropped / choices)
        entropy = torch.cat(oracle.entropies).mean().item()
        assert balance["router_entropy"] == pytest.approx(entropy, rel=1e-4)
        assert 0.1 < entropy < 0.9999
        by_layer = [(c.max() / c.mean()).item() for _, c in sorted(oracle.chosen.items())]
        assert balance["expert_imbalance_by_layer"] == pytest.approx(by_layer, abs=1e-4)
        assert len(set(counted)) == 1, "each layer routes each token once"
    assert (oracle.dropped > 0) == (kind == "capacity")


def gradients_of(kind: str) -> list[tuple[float, list[Tensor]]]:
    """The loss and this rank's gradients with an expert a rank, without and with recomputation."""
    found = []
    for recompute in ("none", "full"):
        config = configuration(kind, Layout(dp=2, ep=2, recompute=recompute))
        config = replace(
            config, model=replace(config.model, experts=replace(FOUR, num_moe_experts=2))
        )
        model, optimizer, scheduler = start(config)
        gradients: list[Tensor] = []

        def is_good(*_: object, model: Any = model, found: list[Tensor] = gradients) -> bool:
            found.extend(p.main_grad.clone() for p in model[0].module.parameters())
            return False

        parts = iter(micro_batches(batches()[0], config))
        loss, *_ = train_step(model, optimizer, scheduler, parts, config, is_good=is_good)
        found.append((float(loss), gradients))
    return found


@pytest.mark.parametrize("kind", ["ladder, experts", "parallel-ladder, experts"])
def test_recomputation_with_an_expert_a_rank(kind: str, tmp_path: Path) -> None:
    """megatron-core then passes the tokens on to the expert as they have arrived."""
    for (loss, gradients), (again, recomputed) in run_ranks(
        2, gradients_of, kind, tmp_path=tmp_path
    ):
        assert again == loss
        assert any(gradient.abs().max() > 0.01 for gradient in gradients)
        for gradient, other in zip(gradients, recomputed, strict=True):
            assert torch.equal(other, gradient)


def save_weights_of(kind: str, folder: Path) -> None:
    model, _, _ = start(configuration(kind))
    save_weights(model, folder)


@pytest.mark.parametrize(
    ("balancing", "layouts", "exact"),
    [
        ("seq_aux_loss", ["4 micro-batches", "TP 2 with SP, EP 2"], True),
        ("aux_loss", ["4 micro-batches"], False),
        pytest.param("none", list(CUTS), True, marks=pytest.mark.slow),
        pytest.param("seq_aux_loss", list(CUTS), True, marks=pytest.mark.slow),
        pytest.param("aux_loss", ["DP 2, EP 2"], False, marks=pytest.mark.slow),
        pytest.param("global_aux_loss", ["4 micro-batches"], False, marks=pytest.mark.slow),
    ],
)
def test_which_losses_for_the_balance_depend_on_the_layout(
    balancing: str, layouts: list[str], exact: bool, tmp_path: Path
) -> None:
    norms = differences(balancing, layouts, tmp_path)
    assert set(norms) == set(layouts)
    if exact:
        assert max(norms.values()) < 1e-5, norms
    else:
        assert min(norms.values()) > 1e-3, norms
