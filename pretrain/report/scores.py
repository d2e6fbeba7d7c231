"""A picture of how the figures of `eval` go on over a run, beside its loss. PNG bytes."""

import math

import numpy as np
from matplotlib.figure import Figure

from pretrain.pictures import COLOURS, png_bytes, si, smooth
from pretrain.report.runs import Run

COLUMNS = 2
MOST = 23
"""The most figures that are drawn: a group of lm-evaluation-harness may have hundreds."""


def names_of(runs: list[Run]) -> list[str]:
    """The figures that some run has at two steps or more, in the order in which `eval` gives them."""
    found = dict.fromkeys(
        name for run in runs for name, points in run.scores.items() if len(points) > 1
    )
    return list(found)


def draw_scores(runs: list[Run]) -> bytes:
    """A panel of the losses, then one for each of the first MOST figures; all against tokens."""
    names = names_of(runs)[:MOST]
    rows = -(-(len(names) + 1) // COLUMNS)
    figure = Figure(figsize=(8.6, 2.7 * rows), layout="constrained")
    panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for panel in panels[len(names) + 1 :]:
        panel.set_axis_off()
    for number, run in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        x = [m["tokens"] for m in run.train]
        panels[0].plot(x, smooth([m["loss"] for m in run.train]), color=colour, label=run.label)
        for dataset in run.datasets():
            lines = run.validation_of(dataset)
            x, y = ([m[name] for m in lines] for name in ("tokens", "loss"))
            panels[0].plot(x, y, color=colour, marker="o", markersize=3, linestyle="--")
        for panel, name in zip(panels[1:], names, strict=False):
            points = run.scores.get(name, [])
            tokens = [run.tokens_at(point.step) for point in points]
            values = [point.value if math.isfinite(point.value) else math.nan for point in points]
            errors = np.array([point.stderr or 0.0 for point in points])
            panel.plot(tokens, values, color=colour, marker="o", markersize=3, label=run.label)
            panel.fill_between(
                tokens, values - errors, values + errors, color=colour, alpha=0.15, linewidth=0
            )
    for panel, title in zip(
        panels, ["loss, nats a token (dots: validation)", *names], strict=False
    ):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("tokens")
        panel.xaxis.set_major_formatter(lambda value, _: si(value))
        panel.grid(True, color="#e6e6e6", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        panels[0].legend(frameon=False, fontsize=9)
    return png_bytes(figure)
