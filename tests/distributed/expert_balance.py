"""Losses for the balance of experts: do their gradients depend on the layout?

    python -m tests.distributed.expert_balance --json FILE

Each loss is computed at several layouts, for one batch of eight sequences with the same weights, in fp32.
The figure is the norm of the difference of all routers' gradients from those of one rank with the whole
batch, over the norm of these. The cross-entropy is in the gradients too; the loss for the balance is
multiplied by 1.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from pretrain.run.checkpoint import load_weights
from tests.distributed.layouts import (
    Layout,
    batches,
    configuration,
    load_start,
    micro_batches,
    save_gradients,
    save_start,
    start,
    train_step,
)
from tests.ranks import run_ranks

LOSSES = ("none", "seq_aux_loss", "aux_loss", "global_aux_loss")
LAYOUTS = {
    "4 micro-batches": Layout(accumulation=4),
    "DP 2, EP 2": Layout(dp=2, ep=2),
    "TP 2 with SP, EP 2": Layout(tp=2, sp=True, ep=2),
    "PP 2, 4 micro-batches": Layout(pp=2, accumulation=4),
}


def gradients_of(layout: Layout, balancing: str, weights: Path, out: Path) -> None:
    """Saves the gradients of a step."""
    config = configuration("experts", layout)
    experts = replace(
        config.model.experts, moe_router_load_balancing_type=balancing, moe_aux_loss_coeff=1.0
    )
    config = replace(config, model=replace(config.model, experts=experts))
    model, optimizer, scheduler = start(config)
    load_start(model, weights)

    def keep(*_: object) -> bool:
        save_gradients(model, out)
        return False

    parts = iter(micro_batches(batches()[0], config))
    train_step(model, optimizer, scheduler, parts, config, is_good=keep)


def differences(balancing: str, names: list[str], folder: Path) -> dict[str, float]:
    """The figure of each layout of LAYOUTS that is named."""
    weights = folder / "weights"
    if not weights.is_dir():
        run_ranks(1, save_start, "experts", weights, tmp_path=folder)

    def routers(name: str, layout: Layout) -> torch.Tensor:
        out = folder / balancing / name
        run_ranks(layout.ranks, gradients_of, layout, balancing, weights, out, tmp_path=folder)
        return load_weights(out)["decoder.layers.mlp.router.weight"]

    whole = routers("one rank", Layout())
    return {
        name: ((routers(name, LAYOUTS[name]) - whole).norm() / whole.norm()).item()
        for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            balancing: differences(balancing, list(LAYOUTS), Path(folder)) for balancing in LOSSES
        }
    versions = {name: version(name) for name in ("megatron-core", "torch")}
    report = {"device": "cpu", "versions": versions, "differences": found}
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    for balancing, row in found.items():
        print(f"{balancing:16}", *(f"{name} {value:.1e}" for name, value in row.items()), sep="  ")


if __name__ == "__main__":
    main()
