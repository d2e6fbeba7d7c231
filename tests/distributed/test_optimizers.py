"""Muon and z-loss at every layout, against the unsharded oracle: plain PyTorch, with torch's Muon of each
projection. And a run of both and a ramp, which is stopped and resumed.
"""

import shutil
from pathlib import Path

import pytest
import torch

from pretrain.run.folder import checkpoint_at
from tests.data_sets import write_data_set
from tests.distributed.layouts import OPTIMIZERS, Layout, configuration
from tests.distributed.optimizer_parity import LAYOUTS, SOME, differences
from tests.distributed.resharding import whole
from tests.distributed.test_layouts import LOSS_TOLERANCE
from tests.distributed.test_training import losses, metrics, pipeline, tensor_parallel, train
from tests.ranks import run_ranks

# Muon's iterations are in bf16: sums in another order may round an element to its neighbour.
MUON_TOLERANCE = 1e-3
# Of the way that the weights have gone, in root mean square.
WEIGHTS_TOLERANCE = {"adam": 1e-3, "muon": 0.03}


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        pytest.param("muon, z-loss", SOME, id="muon, z-loss"),
        *(pytest.param(k, LAYOUTS, id=f"{k}-all", marks=pytest.mark.slow) for k in OPTIMIZERS),
    ],
)
def test_every_layout_updates_as_the_oracle(
    kind: str, layouts: dict[str, Layout], tmp_path: Path
) -> None:
    optimizer = configuration(kind).optimizer
    by_muon = optimizer.optimizer == "muon"
    found = differences(kind, layouts, tmp_path)
    assert found.keys() == layouts.keys()
    for name, row in found.items():
        assert row["loss"] < (MUON_TOLERANCE if by_muon else LOSS_TOLERANCE), name
        assert row.get("moved", 0.0) < (MUON_TOLERANCE if by_muon else LOSS_TOLERANCE), name
        assert row["gradient"] < 1, name
        assert row["weights"] < WEIGHTS_TOLERANCE[optimizer.optimizer], name
        assert all(row["z_losses"]) == bool(optimizer.z_loss_coeff)
        for parameter, has_decay in row["decayed"].items():
            vector = parameter.endswith("bias") or "norm" in parameter or "scales" in parameter
            assert has_decay != vector, parameter
        assert {parameter.split(".")[0] for parameter in row["decayed"]} >= {"decoder", "embedding"}


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
    from tests.distributed import muon_beside_megatron

    (found,) = run_ranks(1, muon_beside_megatron.differences, tmp_path=tmp_path)
    assert len(found) == 3 * 4
    assert all(0 < difference < 0.03 for difference in found.values()), found
