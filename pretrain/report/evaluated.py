"""Pictures of what `eval` has measured on long sequences: loss by position, and needles. PNG bytes."""

import math

import numpy as np
from matplotlib.figure import Figure

from pretrain.evaluation.results import Result
from pretrain.pictures import COLOURS, png_bytes
from pretrain.report.runs import Run

_COLUMNS = 2  # panels of needles side by side


def draw_positions(runs: list[Run]) -> bytes:
    """The loss of each run and data set against position: steps, a step for each bucket of positions."""
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for number, (title, result) in enumerate(titled(runs, "by_position")):
        rows = result["by_position"]
        edges = [max(row["first"], 1) for row in rows] + [rows[-1]["last"]]
        losses = [row["loss"] if math.isfinite(row["loss"]) else math.nan for row in rows]
        colour = COLOURS[number % len(COLOURS)]
        axes.step(edges, [*losses, losses[-1]], where="post", color=colour, label=title)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("tokens before the token, in its window")
    axes.set_ylabel("loss, nats a token")
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return png_bytes(figure)


def draw_needles(runs: list[Run]) -> bytes:
    """A panel for each run and data set: accuracy by the length of the prompt and the needle's depth."""
    found = titled(runs, "by_place")
    columns = min(_COLUMNS, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    image = None
    for panel, (title, result) in zip(panels, found, strict=False):
        shares = {(row["length"], row["depth"]): row["accuracy"] for row in result["by_place"]}
        lengths, depths = (sorted({place[i] for place in shares}) for i in (0, 1))
        cells = np.array([[shares.get((n, d), math.nan) for n in lengths] for d in depths])
        panel.set_axis_on()
        image = panel.imshow(cells, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (line, column), share in np.ndenumerate(cells):
            if math.isfinite(share):
                colour = "black" if share > 0.5 else "white"
                panel.text(
                    column, line, f"{share:.2f}", ha="center", va="center", color=colour, fontsize=9
                )
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("tokens of the prompt")
        panel.set_ylabel("text before the needle")
    if image is not None:
        figure.colorbar(image, ax=panels, label="right of ten words (chance 0.1)")
    return png_bytes(figure)


def titled(runs: list[Run], field: str) -> list[tuple[str, Result]]:
    """The results of all runs that have a field, with names that tell them apart."""
    found = [(run.label, result) for run in runs for result in run.results(field)]
    several = len({(result.get("data"), result.get("split")) for _, result in found}) > 1
    return [
        (f"{label}, {result.get('data')} {result.get('split')}" if several else label, result)
        for label, result in found
    ]
