"""How far is each layout from the unsharded oracle, with AdamW, Muon and z-loss?

    python -m tests.distributed.optimizer_parity --json FILE

The oracle is plain PyTorch in fp32, with torch's Muon of each projection. Each layout trains six steps from
the same weights, and opens the checkpoint of the layout before for a step more.
"""

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_ladder.hf.convert import megatron_to_hf
from pretrain.run.checkpoint import load_weights
from tests.distributed.layouts import (
    OPTIMIZERS,
    Layout,
    batches,
    configuration,
    run_layouts,
    save_start,
)
from tests.oracle import loss, plain_model, train_losses
from tests.ranks import run_ranks

# In each run of the tests, and beside them in the slow one; by the number of their ranks.
SOME = {
    "TP 2, SP": Layout(tp=2, sp=True, accumulation=2),
    "PP 2": Layout(pp=2, accumulation=4),
    "DP 2": Layout(dp=2),
}
LAYOUTS = {
    "TP 1": Layout(accumulation=4),
    "TP 2": Layout(tp=2),
    **SOME,
    "PP 2 in 2 chunks": Layout(pp=2, vpp=2, accumulation=4),
    "CP 2": Layout(cp=2),
    "TP 2, DP 2": Layout(tp=2, dp=2),
    "TP 2, SP, PP 2": Layout(tp=2, sp=True, pp=2, accumulation=4),
    "TP 2, SP, CP 2": Layout(tp=2, sp=True, cp=2),
    "DP 4": Layout(dp=4),
}


def differences(kind: str, layouts: dict[str, Layout], folder: Path) -> dict[str, dict[str, Any]]:
    """By layout:

    loss: the largest difference of six losses, of any rank, in nats.
    gradient: of a parameter at the first step, over what is allowed: 2e-6 + 1e-4 of it.
    weights: of a parameter after six steps, in root mean square over how far it has gone.
    moved: of the loss of held-out data a step after the checkpoint of the layout before was opened.
    z_losses, decayed: of `run_layout`, from all ranks.
    """
    weights = folder / "weights"
    run_ranks(1, save_start, kind, weights, tmp_path=folder)
    config = configuration(kind)
    *steps, held_out = batches()
    plain = plain_model(config.model, weights)
    begin = {name: p.detach().clone() for name, p in plain.named_parameters()}
    expected, gradients = train_losses(plain, config, 1, steps)
    trained = {name: p.detach() for name, p in plain.named_parameters()}
    further = plain_model(config.model, weights)
    train_losses(further, config, 1, [*steps, steps[0]])
    a_step_later = loss(further, config.model, 1, held_out).item()

    found: dict[str, dict[str, Any]] = {}
    before = None
    for ranks in sorted({layout.ranks for layout in layouts.values()}):
        group = {name: layout for name, layout in layouts.items() if layout.ranks == ranks}
        out = folder / f"{ranks} ranks"
        by_rank = run_ranks(
            *(ranks, run_layouts, kind, list(group.values()), weights, before, out),
            tmp_path=folder,
        )
        for number, name in enumerate(group):
            results = [of_rank[number] for of_rank in by_rank]
            losses = [
                abs(a - b) for r in results for a, b in zip(r["losses"], expected, strict=True)
            ]
            # lm_head.weight is the embedding, tied.
            first = dict(
                megatron_to_hf(load_weights(out / str(number) / "gradients"), plain.config)
            )
            last = dict(megatron_to_hf(load_weights(results[0]["checkpoint"]), plain.config))
            row: dict[str, Any] = {
                "loss": max(losses),
                "gradient": max(
                    ((first[n] - g).abs() / (2e-6 + 1e-4 * g.abs())).max().item()
                    for n, g in gradients.items()
                ),
                "weights": max(
                    ((last[n] - w).norm() / (w - begin[n]).norm()).item()
                    for n, w in trained.items()
                ),
                "z_losses": [z for r in results for z in r["z_losses"]],
                "decayed": {n: d for r in results for n, d in r["decayed"].items()},
            }
            if before is not None:
                row["moved"] = abs(results[0]["validation a step later"] - a_step_later)
            found[name], before = row, results[0]["checkpoint"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    found = {}
    for kind in OPTIMIZERS:
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = differences(kind, LAYOUTS, Path(folder))
        for name, row in found[kind].items():
            del row["z_losses"], row["decayed"]
            print(f"{kind:14} {name:18}", *(f"{k} {v:.1e}" for k, v in row.items()), flush=True)
        versions = {name: version(name) for name in ("megatron-core", "torch")}
        report = {"device": "cpu", "versions": versions, "differences": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
