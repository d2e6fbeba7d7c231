"""Reads a run's metrics for the report."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ladder.errors import UserError
from pretrain.evaluation.results import Point, Result, points_by_name, results_by_step
from pretrain.run.goodput import Goodput, read_goodput
from pretrain.run.metrics import OF_WATCH, read_metrics

Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """The metrics of one run, its lines sorted by kind."""

    path: Path
    label: str
    start: dict[str, Any]
    train: Lines
    validation: Lines
    unigram: dict[str, float]
    """For each data set, the entropy of single tokens, in nats a token."""
    restarts: int
    goodput: Goodput | None
    """None for a run of an older version, which did not record its starts."""
    changes: Lines
    """The starts at which options got other values, in the order of their steps."""
    bad_steps: Lines
    slow_ranks: Lines
    finished: bool
    evaluated: tuple[int, list[Result]] | None
    """The step that `eval` measured last, and the results."""
    scores: dict[str, list[Point]]
    """By task, metric and data set: what `eval` has measured, by hand or beside the training."""
    beside: Lines
    """What has come of checkpoints beside the training; lines of the kinds OF_WATCH."""
    config_text: str = field(repr=False)

    @property
    def is_branch(self) -> bool:
        """Whether its first step is not the first that its weights were trained for."""
        return bool(self.start.get("branch_from"))

    def datasets(self) -> list[str]:
        return sorted({line["dataset"] for line in self.validation})

    def validation_of(self, dataset: str) -> Lines:
        return [line for line in self.validation if line["dataset"] == dataset]

    def results(self, having: str) -> list[Result]:
        """The results of `eval` that have this field."""
        return [result for result in (self.evaluated or (0, []))[1] if result.get(having)]

    def tokens_at(self, step: int) -> float:
        """The tokens of the first `step` steps, as far as its lines tell; between two, interpolated."""
        known = [(m["step"], m["tokens"]) for m in [*self.train, *self.validation]]
        steps, tokens = zip(*sorted({(0, 0), *known}), strict=True)
        return float(np.interp(step, steps, tokens))

    def loss_at(self, dataset: str, seconds: float) -> float | None:
        """Validation loss after `seconds` of training time, interpolated between two validations.

        After the last validation it is that one's; None before the first, or where there is none.
        """
        lines = self.validation_of(dataset)
        for before, after in itertools.pairwise(lines):
            if before["time"] <= seconds <= after["time"]:
                share = (seconds - before["time"]) / max(after["time"] - before["time"], 1e-9)
                return before["loss"] + share * (after["loss"] - before["loss"])
        return lines[-1]["loss"] if lines and lines[-1]["time"] <= seconds else None


def read_run(path: Path, label: str) -> Run:
    """Reads the metrics of a run. Raises UserError when it has none."""
    metrics = read_metrics(path)
    by_kind: dict[str, Lines] = {}
    for line in metrics:
        by_kind.setdefault(line["kind"], []).append(line)
    if "start" not in by_kind:
        raise UserError(f"{path}/metrics.jsonl is empty: the run has not started yet")
    config = path / "config.json"
    train = by_kind.get("train", [])
    evaluated = results_by_step(path)
    if train:
        # Of a later step only a file is left: the run went back behind it, and is not there again.
        evaluated = {k: v for k, v in evaluated.items() if k <= train[-1]["step"]}
    goodput = read_goodput(path, train[-1]["time"] if train else 0.0)
    restarts = goodput.ends.total() if goodput else len(by_kind["start"]) - 1
    return Run(
        path=path,
        label=label,
        start=by_kind["start"][-1],
        train=train,
        validation=by_kind.get("validation", []),
        unigram={b["dataset"]: b["unigram_loss"] for b in by_kind.get("baseline", [])},
        restarts=restarts,
        goodput=goodput,
        changes=_changes(by_kind["start"]),
        bad_steps=by_kind.get("bad_step", []),
        slow_ranks=by_kind.get("slow_rank", []),
        finished=any(line["reason"] == "finished" for line in by_kind.get("end", [])),
        evaluated=max(evaluated.items(), key=lambda item: item[0]) if evaluated else None,
        scores=points_by_name(evaluated),
        beside=[line for line in metrics if line["kind"] in OF_WATCH],
        config_text=config.read_text() if config.is_file() else "",
    )


def _changes(starts: Lines) -> Lines:
    """Of several starts at one step, the last counts: the others trained no step that is left."""
    last = {line.get("step", 0): line for line in starts}
    return [line for _, line in sorted(last.items()) if line.get("changed")]
