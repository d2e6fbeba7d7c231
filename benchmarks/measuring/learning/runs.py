"""The curves of the runs of benchmarks/learning.py, from the runs' folders."""

import statistics
from pathlib import Path
from typing import Any

from pretrain.config.train import load_config
from pretrain.data.folders import open_folder
from pretrain.pictures import smooth
from pretrain.run.metrics import read_metrics

Run = dict[str, Any]


def read_run(run_dir: Path, kind: str, seed: int) -> Run:
    """A finished run: its kind, sizes and versions, and its curves as columns."""
    lines = read_metrics(run_dir)
    start = next(line for line in lines if line["kind"] == "start")
    training = [line for line in lines if line["kind"] == "train"]
    config = load_config(run_dir / "config.json")
    return {
        "kind": kind,
        "seed": seed,
        "device": start["device"],
        "ranks": start["world_size"],
        "versions": start["versions"],
        "parameters": start["parameters"],
        "parameters_without_embeddings": config.model.num_parameters(embeddings=False),
        "tokens_per_step": start["tokens_per_step"],
        "seconds_training": round(training[-1]["time"]),
        "tokens_per_second": round(statistics.median(m["tokens_per_second"] for m in training)),
        "unigram_loss": {m["dataset"]: m["unigram_loss"] for m in lines if m["kind"] == "baseline"},
        "training": columns(training),
        **load_balance(training),
        "validation": {
            dataset: columns([m for m in lines if m.get("dataset") == dataset and "step" in m])
            for dataset in sorted({m["dataset"] for m in lines if m["kind"] == "validation"})
        },
    }


def columns(lines: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Steps, tokens and losses of lines of metrics."""
    return {
        "step": [line["step"] for line in lines],
        "tokens": [line["tokens"] for line in lines],
        "loss": [round(line["loss"], 5) for line in lines],
    }


def load_balance(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """How evenly a mixture's experts were used, at the steps of `training`; {} without experts."""
    names = ("expert_imbalance", "dropped_share")
    curves = {name: [round(line[name], 5) for line in lines if name in line] for name in names}
    return {"load_balance": curves} if curves[names[0]] else {}


def late_mean(run: Run, name: str) -> float:
    """The mean of a curve of `load_balance` over the second half of the training."""
    curve = run["load_balance"][name]
    return round(statistics.fmean(curve[len(curve) // 2 :]), 5)


def by_tokens(column: dict[str, list[Any]]) -> dict[int, float]:
    return dict(zip(column["tokens"], column["loss"], strict=True))


def smoothed(run: Run) -> dict[int, float]:
    """The smoothed training loss of a run, by tokens."""
    training = run["training"]
    return dict(zip(training["tokens"], smooth(training["loss"]), strict=True))


def validation(run: Run) -> dict[int, float]:
    """The validation loss of a run, by tokens; with several data sets, their mean."""
    tokens, mean, _, _ = mean_and_spread([by_tokens(c) for c in run["validation"].values()])
    return dict(zip(tokens, mean, strict=True))


def last_loss(run: Run) -> float:
    losses = validation(run)
    return losses[max(losses)]


def mean_and_spread(
    curves: list[dict[int, float]],
) -> tuple[list[int], list[float], list[float], list[float]]:
    """The places where all curves have a point; at each the mean, the lowest and the highest value."""
    places = sorted(set.intersection(*map(set, curves)))
    points = [[curve[place] for curve in curves] for place in places]
    return (
        places,
        [statistics.fmean(p) for p in points],
        [min(p) for p in points],
        [max(p) for p in points],
    )


def data_facts(path: Path) -> dict[str, Any]:
    """A data set's name and size."""
    folder = open_folder(path)
    return {
        "name": folder.name,
        "vocab_size": folder.tokenizer["vocab_size"],
        "training_tokens": folder.tokens("train"),
        "validation_tokens": folder.tokens("validation"),
    }
