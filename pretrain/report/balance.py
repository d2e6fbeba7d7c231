"""A picture of how evenly a run's tokens were sent to experts. PNG bytes."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pretrain.pictures import COLOURS, png_bytes, si
from pretrain.report.runs import Run

PANELS = {
    "expert_imbalance": "fullest expert over the mean, worst layer",
    "router_entropy": "routers' entropy (1: all experts alike)",
    "dropped_share": "share of choices that was dropped",
}
MOST_LAYERS = 128
"""Maps of more layers are not drawn: their rows would be thinner than a pixel."""


def has_balance(run: Run) -> bool:
    return any("expert_imbalance" in line for line in run.train)


def balance_in_words(run: Run) -> list[tuple[str, str]]:
    """The report's rows of the last logged step that has it."""
    last = next(line for line in reversed(run.train) if "expert_imbalance" in line)
    rows = [("fullest expert over the mean, worst layer", f"{last['expert_imbalance']:.2f}")]
    if "router_entropy" in last:  # older runs have none
        rows.append(("routers' entropy, of that of equal scores", f"{last['router_entropy']:.3f}"))
    if last.get("dropped_share"):
        rows.append(("choices of an expert that were dropped", f"{last['dropped_share']:.1%}"))
    return rows


def draw_balance(runs: list[Run]) -> bytes:
    """A panel for each figure against tokens, of all runs; then for each run a map of its layers."""
    having = [run for run in runs if has_balance(run)]
    names = [n for n in PANELS if any(line.get(n) for run in having for line in run.train)]
    maps = [run for run in having if 0 < len(_layers(run)) <= MOST_LAYERS]
    count = len(names) + len(maps)
    figure = Figure(figsize=(8.6, 2.6 * count), layout="constrained")
    panels = list(figure.subplots(count, 1, squeeze=False).flat)
    for panel, name in zip(panels, names, strict=False):
        for number, run in enumerate(runs):
            lines = [line for line in run.train if name in line]
            x, y = ([line[key] for line in lines] for key in ("tokens", name))
            colour = COLOURS[number % len(COLOURS)]
            panel.plot(x, y, color=colour, linewidth=1.2, label=run.label)
        panel.set_title(PANELS[name], fontsize=10)
        panel.grid(True, color="#e6e6e6", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        _against_tokens(panel)
    if len(runs) > 1:
        panels[0].legend(frameon=False, fontsize=9)
    for panel, run in zip(panels[len(names) :], maps, strict=True):
        lines = [line for line in run.train if line.get("expert_imbalance_by_layer")]
        layers = _layers(run)
        tokens = [line["tokens"] for line in lines]
        cells = np.array(
            [[_number(line["expert_imbalance_by_layer"], i) for line in lines] for i in layers]
        )
        mesh = panel.pcolormesh(tokens, layers, cells, cmap="cividis", shading="nearest", vmin=1.0)
        figure.colorbar(mesh, ax=panel, label="over the mean")
        panel.set_title(f"fullest expert of each layer, {run.label}", fontsize=10)
        panel.set_ylabel("layer, from 0")
        panel.yaxis.get_major_locator().set_params(integer=True)
        _against_tokens(panel)
    return png_bytes(figure)


def _layers(run: Run) -> list[int]:
    """The numbers of the layers that have experts."""
    for line in run.train:
        if by_layer := line.get("expert_imbalance_by_layer"):
            return [i for i, value in enumerate(by_layer) if value is not None]
    return []


def _number(by_layer: list[float | None], layer: int) -> float:
    value = by_layer[layer] if layer < len(by_layer) else None
    return math.nan if value is None else value


def _against_tokens(panel: Any) -> None:
    panel.set_xlabel("tokens")
    panel.xaxis.set_major_formatter(lambda value, _: si(value))
