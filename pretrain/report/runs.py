"""Reads a run's metrics for the report."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ladder.errors import UserError
from pretrain.evaluation.results import Result, latest_results
from pretrain.run.goodput import Goodput, read_goodput
from pretrain.run.metrics import read_metrics

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
    config_text: str = field(repr=False)

    def datasets(self) -> list[str]:
        return sorted({line["dataset"] for line in self.validation})

    def validation_of(self, dataset: str) -> Lines:
        return [line for line in self.validation if line["dataset"] == dataset]

    def results(self, having: str) -> list[Result]:
        """The results of `eval` that have this field."""
        return [result for result in (self.evaluated or (0, []))[1] if result.get(having)]

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
        evaluated=latest_results(path),
        config_text=config.read_text() if config.is_file() else "",
    )


def _changes(starts: Lines) -> Lines:
    """Of several starts at one step, the last counts: the others trained no step that is left."""
    last = {line.get("step", 0): line for line in starts}
    return [line for _, line in sorted(last.items()) if line.get("changed")]
