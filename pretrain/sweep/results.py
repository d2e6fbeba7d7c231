"""What the runs of a sweep have come to, read from their folders."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ladder.errors import UserError
from pretrain.config.train import load_config
from pretrain.run.metrics import read_metrics
from pretrain.run.status import read_status
from pretrain.sweep.file import PER_PARAMETER, TOKENS, Fields
from pretrain.sweep.folder import config_file, listed_runs

RATE, SEED = "optimizer.lr", "seed"
# What a sweep varies within a kind. All other axes make kinds.
_WITHIN = (RATE, SEED, TOKENS, PER_PARAMETER)


@dataclass(frozen=True)
class Result:
    """One run."""

    name: str
    size: str
    kind: str
    """The values of the axes but learning rate, seed and budget, in words; "": there are none."""
    rate: float
    """The peak of the learning rate."""
    seed: int
    parameters: int
    """N, without embeddings."""
    tokens: int
    """D."""
    held_out: bool
    state: str
    """done, diverged (its last loss is no number), failed, begun or not begun."""
    loss: float | None
    """Validation loss after the last step, nats a token; of several data sets the mean. None: not done."""


def read_results(folder: Path) -> list[Result]:
    """All runs of a sweep, trained or not.

    Raises:
        UserError: the folder is no sweep's.
    """
    listed = listed_runs(folder)
    axes = {name for run in listed for name in run["values"]} - {*_WITHIN}
    changing = {n for n in axes if len({str(run["values"].get(n)) for run in listed}) > 1}
    return [_result(folder, run, changing) for run in listed]


def last_loss(run_dir: Path) -> float | None:
    """The validation loss after a finished run's last step; of several data sets the mean. None: there is
    none."""
    try:
        lines = read_metrics(run_dir)
    except UserError:
        return None
    if not any(line["kind"] == "end" and line["reason"] == "finished" for line in lines):
        return None
    last = {line["dataset"]: line["loss"] for line in lines if line["kind"] == "validation"}
    return statistics.fmean(last.values()) if last else None


def _result(folder: Path, run: dict[str, Any], changing: set[str]) -> Result:
    config = load_config(config_file(folder, run["name"]))
    loss = last_loss(folder / run["name"])
    status = read_status(folder / run["name"])
    state = "not begun"
    if loss is not None:
        state = "done" if math.isfinite(loss) else "diverged"
    elif status is not None:
        state = "failed" if status["state"] == "failed" else "begun"
    return Result(
        name=run["name"],
        size=run["size"],
        kind=_kind({n: v for n, v in run["values"].items() if n in changing}),
        rate=config.optimizer.lr,
        seed=config.seed,
        parameters=run["parameters"],
        tokens=run["tokens"],
        held_out=run["held_out"],
        state=state,
        loss=loss if state == "done" else None,
    )


def _kind(values: Fields) -> str:
    """Residual kinds go by their names alone."""
    return ", ".join(
        str(value) if name == "model.residual" else f"{name.rpartition('.')[2]} {value}"
        for name, value in values.items()
    )
