"""The report's pictures, as PNG bytes."""

import itertools
import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pretrain.pictures import COLOURS, GREY, png_bytes, si, smooth
from pretrain.report.runs import Run

LABELS = {
    "tokens": "tokens",
    "time": "training time",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens a second",
}


def draw_losses(runs: list[Run], against: str) -> bytes:
    """The losses of every run: training loss as a thin line and smoothed, validation loss as dots.

    Args:
        against: the horizontal axis, "tokens" or "time".
    """
    scale, unit = 1.0, ""
    if against == "time":
        scale, unit = _time_unit(max((m["time"] for run in runs for m in run.train), default=0.0))
    figure, axes = _axes(against, "loss, nats a token", unit=unit)
    unigrams: dict[str, float] = {}
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        x = [m[against] / scale for m in run.train]
        y = [_finite(m["loss"]) for m in run.train]
        axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.25)
        axes.plot(x, smooth(y), color=colour, linewidth=1.6, label=f"{run.label}, training")
        for marker, dataset in zip(itertools.cycle("os^Dv"), run.datasets(), strict=False):
            lines = run.validation_of(dataset)
            several = len(run.datasets()) > 1
            axes.plot(
                [m[against] / scale for m in lines],
                [_finite(m["loss"]) for m in lines],
                color=colour,
                marker=marker,
                markersize=5,
                markeredgecolor="white",
                linewidth=1,
                linestyle="--",
                label=f"{run.label}, validation" + (f" ({dataset})" if several else ""),
            )
        unigrams |= run.unigram
        for number, line in enumerate(run.changes if against == "tokens" else ()):
            label = None if number else f"{run.label}, options changed"
            axes.axvline(line.get("tokens", 0), color=colour, ls=":", lw=1.2, label=label)
    for dataset, loss in unigrams.items():
        axes.axhline(loss, color=GREY, linestyle=":", linewidth=1.4)
        axes.annotate(
            f"entropy of single tokens, {dataset}: {loss:.2f}",
            (0.995, loss),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=GREY,
        )
    if runs and any(run.train for run in runs):
        axes.legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1.0, 0.9))
    return png_bytes(figure)


def draw_series(runs: list[Run], name: str) -> bytes:
    """One figure of the training metrics against tokens, for every run.

    Args:
        name: the figure, one of LABELS.
    """
    figure, axes = _axes("tokens", LABELS[name], height=3.0)
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        x = [m["tokens"] for m in run.train]
        y = [_finite(m[name]) for m in run.train]
        axes.plot(x, y, color=colour, linewidth=1.2, label=run.label)
    axes.set_ylim(bottom=0)
    if len(runs) > 1:
        axes.legend(frameon=False, fontsize=9)
    if name == "tokens_per_second":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: si(v)))
    return png_bytes(figure)


def _axes(against: str, label: str, height: float = 4.6, unit: str = "") -> tuple[Figure, Any]:
    figure = Figure(figsize=(8.6, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(LABELS[against] + (f", {unit}" if unit else ""))
    axes.set_ylabel(label)
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: si(v)))
    return figure, axes


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _finite(value: float) -> float:
    """NaN in place of infinity: NaN makes a gap in the curve, and infinity must do so too."""
    return value if math.isfinite(value) else math.nan


def _time_unit(longest_s: float) -> tuple[float, str]:
    """The unit that suits the longest time: its length in seconds, and its name."""
    for seconds, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if longest_s >= 2 * seconds:
            return seconds, name
    return 1.0, "seconds"
