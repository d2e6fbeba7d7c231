"""Muon and z-loss at every layout, against the unsharded oracle: plain PyTorch, with torch's Muon of each
projection. And a run of both and a ramp, which is stopped and resumed.
"""

import shutil
from pathlib import Path

import pytest
import torch

from megatron_ladder.hf.convert import megatron_to_hf
from pretrain.run.checkpoint import load_weights
from pretrain.run.folder import checkpoint_at
from tests.data_sets import write_data_set
from tests.distributed.layouts import (
    OPTIMIZERS,
    Layout,
    batches,
    configuration,
    run_layouts,
    save_start,
)
from tests.distributed.resharding import whole
from tests.distributed.test_layouts import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from tests.distributed.test_training import losses, metrics, pipeline, tensor_parallel, train
from tests.oracle import loss, plain_model, train_losses
from tests.ranks import run_ranks

# Muon's iterations are in bf16: sums in another order may round an element to its neighbour.
MUON_TOLERANCE = 1e-3
# Of the way that the weights have gone, in root mean square.
WEIGHTS_TOLERANCE = {"adam": 1e-3, "muon": 0.03}

SOME = [
    Layout(tp=2, sp=True, accumulation=2),
    Layout(pp=2, accumulation=4),
    Layout(dp=2),
]
MORE = [
    Layout(accumulation=4),
    Layout(tp=2),
    *SOME,
    Layout(pp=2, vpp=2, accumulation=4),
    Layout(cp=2),
    Layout(tp=2, dp=2),
    Layout(tp=2, sp=True, pp=2, accumulation=4),
    Layout(tp=2, sp=True, cp=2),
    Layout(dp=4),
]


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        pytest.param("muon, z-loss", SOME, id="muon, z-loss"),
        *(pytest.param(k, MORE, id=f"{k}-all", marks=pytest.mark.slow) for k in OPTIMIZERS),
    ],
)
def test_every_layout_updates_as_the_oracle(
    kind: str, layouts: list[Layout], tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    run_ranks(1, save_start, kind, weights, tmp_path=tmp_path)
    config = configuration(kind)
    *steps, held_out = batches()
    plain = plain_model(config.model, weights)
    begin = {name: p.detach().clone() for name, p in plain.named_parameters()}
    expected, gradients = train_losses(plain, config, 1, steps)
    trained = {name: p.detach() for name, p in plain.named_parameters()}
    # Another model, a step further: that of a checkpoint which the next layout has read.
    further = plain_model(config.model, weights)
    train_losses(further, config, 1, [*steps, steps[0]])
    a_step_later = loss(further, config.model, 1, held_out).item()
    by_muon = config.optimizer.optimizer == "muon"
    tolerance = MUON_TOLERANCE if by_muon else LOSS_TOLERANCE

    before = None
    for ranks in sorted({layout.ranks for layout in layouts}):
        group = [layout for layout in layouts if layout.ranks == ranks]
        folder = tmp_path / f"{ranks} ranks"
        by_rank = run_ranks(
            ranks, run_layouts, kind, group, weights, before, folder, tmp_path=tmp_path
        )
        for number, layout in enumerate(group):
            for result in (results[number] for results in by_rank):
                assert result["losses"] == pytest.approx(expected, abs=tolerance), layout
                assert all(result["z_losses"]) == bool(config.optimizer.z_loss_coeff)
                assert result["decayed"]
                for name, has_decay in result["decayed"].items():
                    vector = "norm" in name or name.endswith("bias") or "scales" in name
                    assert has_decay != vector, name
            found = megatron_to_hf(load_weights(folder / str(number) / "gradients"), plain.config)
            for name, gradient in found:
                if name in gradients:  # lm_head.weight is the embedding, tied
                    torch.testing.assert_close(
                        gradient,
                        gradients[name],
                        atol=GRADIENT_TOLERANCE,
                        rtol=1e-4,
                        msg=lambda m, layout=layout, name=name: f"{layout}, {name}: {m}",
                    )
            result = by_rank[0][number]
            for name, weight in megatron_to_hf(load_weights(result["checkpoint"]), plain.config):
                if name in trained:
                    way = (trained[name] - begin[name]).norm()
                    off = ((weight - trained[name]).norm() / way).item()
                    assert off < WEIGHTS_TOLERANCE["muon" if by_muon else "adam"], (layout, name)
            if before is not None:
                later = result["validation a step later"]
                assert later == pytest.approx(a_step_later, abs=tolerance), f"into {layout}"
            before = result["checkpoint"]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("--nproc-per-node", "2"), id="DP 2"),
        pytest.param(tensor_parallel(2), id="TP 2", marks=pytest.mark.slow),
        pytest.param(pipeline(2), id="PP 2", marks=pytest.mark.slow),
    ],
)
def test_a_run_with_muon_z_loss_and_a_ramp_is_resumed_bitwise(
    layout: tuple[str, ...], tmp_path: Path
) -> None:
    """Stopped within the ramp. It trains on each sequence once, as a run without a ramp does."""
    data = write_data_set(tmp_path / "data")
    ramp = "--schedule.rampup-batch-size 2 2 12 --schedule.train-steps 6 --global-batch-size 6"
    both = "--optimizer.optimizer muon --optimizer.z-loss-coeff 1e-3 --micro-batch-size 1"
    kept = "--save-interval 1 --keep-last 9 --data.num-workers 0 --no-tensorboard"
    given = [*ramp.split(), *both.split(), *kept.split()]
    run = tmp_path / "run"
    train(data, run, *given, *layout)
    straight, last = losses(run, 6), whole(checkpoint_at(run, 6))
    length = 64
    tokens = [line["tokens"] for line in metrics(run, "train")]
    assert tokens == [length * n for n in (2, 4, 6, 10, 14, 20)]
    assert all(line["z_loss"] > 0 for line in metrics(run, "train"))
    for step in range(3, 7):
        shutil.rmtree(checkpoint_at(run, step))
    train(data, run, *given, *layout)
    assert losses(run, 6) == straight
    again = whole(checkpoint_at(run, 6))
    assert again.keys() == last.keys()
    for name, tensor in last.items():
        assert torch.equal(again[name], tensor), name
    second = {n for n in last if n.startswith("optimizer.state.exp_avg_sq.")}
    assert second and not any(
        "linear" in n and n.endswith("weight") and "norm" not in n for n in second
    )


def test_an_update_is_that_of_megatron(tmp_path: Path) -> None:
    """Of the layers' matrices but gate and up projections. megatron-core iterates in fp32 here, torch in
    bf16."""
    pytest.importorskip("emerging_optimizers")
    pytest.importorskip("megatron.core.optimizer.emerging_optimizers")  # 0.19
    from tests.distributed.muon_beside_megatron import differences

    (found,) = run_ranks(1, differences, tmp_path=tmp_path)
    assert len(found) == 3 * 4
    assert all(0 < difference < 0.03 for difference in found.values()), found
