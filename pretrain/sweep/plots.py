"""The pictures of a sweep's page, as PNG bytes."""

from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from pretrain.pictures import COLOURS, png_bytes
from pretrain.sizes import in_units
from pretrain.sweep.analysis import Analysis

_STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
_COLUMNS = 3


def draw_rates(found: Analysis) -> bytes:
    """Loss against learning rate: a panel for each size, a colour for each kind, a style for each budget, a
    star at the best."""
    sizes = list(dict.fromkeys(cell.size for cell in found.cells))
    columns = min(_COLUMNS, len(sizes))
    lines = -(-len(sizes) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel in panels[len(sizes) :]:
        panel.set_axis_off()
    budgets = sorted({cell.tokens for cell in found.cells})
    for panel, size in zip(panels, sizes, strict=False):
        for cell in (c for c in found.cells if c.size == size):
            style = _STYLES[budgets.index(cell.tokens) % len(_STYLES)]
            colour = _colour(found, cell.kind)
            rates = list(cell.losses)
            panel.plot(rates, list(cell.losses.values()), "o" + style, color=colour, ms=4)
            if not cell.best.edge:
                panel.plot(cell.best.rate, cell.best.loss, "*", color=colour, ms=11)
        panel.set_xscale("log")
        panel.set_title(size or "loss against rate", fontsize=10)
        panel.set_xlabel("learning rate, the peak")
        panel.set_ylabel("validation loss, nats a token")
        _plain(panel)
    keys = [Line2D([], [], color=_colour(found, k), label=k or "loss") for k in found.kinds]
    for number, tokens in enumerate(budgets):
        style = _STYLES[number % len(_STYLES)]
        label = f"{in_units(tokens)} tokens"
        keys.append(Line2D([], [], color="0.4", linestyle=style, label=label))
    figure.legend(
        handles=keys, loc="outside lower center", ncols=min(8, len(keys)), frameon=False, fontsize=9
    )
    return png_bytes(figure)


def draw_law(found: Analysis) -> bytes:
    """Loss against parameters: a panel for each kind with a law, a curve for each budget; what was held out
    as an empty circle, over its predicted interval."""
    kinds = list(found.fits)
    figure = Figure(figsize=(4.4 * max(1, len(kinds)), 3.8), layout="constrained")
    panels = figure.subplots(1, max(1, len(kinds)), squeeze=False, sharey=True)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        law = found.fits[kind].law
        cells = [cell for cell in found.cells if cell.kind == kind]
        sizes = [cell.parameters for cell in cells]
        across = np.geomspace(min(sizes) / 1.3, max(sizes) * 1.3, 60)
        for number, tokens in enumerate(sorted({cell.tokens for cell in cells})):
            colour = COLOURS[number % len(COLOURS)]
            label = f"{in_units(tokens)} tokens"
            panel.plot(across, [law.loss(n, tokens) for n in across], color=colour, label=label)
            of_budget = [cell for cell in cells if cell.tokens == tokens]
            for cell in of_budget:
                fill = "white" if cell.held_out else colour
                panel.plot(
                    cell.parameters, cell.best.loss, "o", color=colour, mfc=fill, ms=6, zorder=3
                )
            for p in found.held_out:
                if (p.kind, p.tokens) == (kind, tokens):
                    panel.plot([p.parameters] * 2, [p.low, p.high], color=colour, lw=4, alpha=0.35)
        panel.set_xscale("log")
        panel.set_title(kind or "all runs", fontsize=10)
        _parameters(panel)
        panel.set_ylabel("validation loss at the best rate")
        panel.legend(frameon=False, fontsize=8)
        _plain(panel)
    return png_bytes(figure)


def draw_best_rates(found: Analysis) -> bytes:
    """Best rates against parameters, with their intervals, and the power law of each kind. Rates at an edge
    of those tried are crosses. Kinds are drawn a little apart, as their best rates may be the same."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for number, kind in enumerate(found.kinds):
        colour = _colour(found, kind)
        cells = [cell for cell in found.cells if cell.kind == kind]
        for cell in cells:
            x = cell.parameters * 1.05**number
            axes.plot(x, cell.best.rate, "x" if cell.best.edge else "o", color=colour, ms=6)
            if cell.rate_between:
                axes.plot([x] * 2, cell.rate_between, color=colour, lw=1)
        label = kind or "all runs"
        if rates := found.rates.get(kind):
            sizes = np.geomspace(*rates.sizes, 20)
            axes.plot(sizes, [rates.law.rate(n) for n in sizes], color=colour, label=label)
        else:
            axes.plot([], [], "o", color=colour, label=label)
    if any(cell.best.edge for cell in found.cells):
        axes.plot([], [], "x", color="0.4", label="at the edge of the rates tried")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _parameters(axes)
    axes.set_ylabel("best learning rate")
    axes.legend(frameon=False, fontsize=9)
    _plain(axes)
    return png_bytes(figure)


def _colour(found: Analysis, kind: str) -> str:
    return COLOURS[found.kinds.index(kind) % len(COLOURS)]


def _parameters(axes: Any) -> None:
    axes.set_xlabel("parameters without embeddings")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_units(value)))


def _plain(axes: Any) -> None:
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def pictures(found: Analysis) -> dict[str, tuple[bytes, str]]:
    """The pictures by their files' names, each with its title."""
    drawn: dict[str, tuple[bytes, str]] = {}
    if any(len(cell.losses) > 1 for cell in found.cells):
        drawn["rates"] = (
            draw_rates(found),
            "Loss against learning rate; stars: the best, by a parabola",
        )
        drawn["best_rates"] = draw_best_rates(found), "Best learning rate against size"
    if found.fits:
        title = (
            "The law: curves fitted to filled circles; empty: held out, over the predicted interval"
        )
        drawn["law"] = draw_law(found), title
    return drawn
