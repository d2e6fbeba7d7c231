"""The pictures of `report depth`, as PNG bytes. Each model has a row of its own, or a colour of its own."""

import math
from typing import Any

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pretrain.depth.measured import Measured
from pretrain.pictures import COLOURS, GREY, png_bytes

WIDTH = 8.6
SUB_LAYERS = {"attention": "attention", "mlp": "MLP", "layer": "whole layer"}
NUMBERS_UP_TO = 14  # with more layers than this, numbers in the cells would be too small to read


def draw_contributions(models: list[Measured]) -> bytes:
    """Relative contribution and cosine of each layer."""
    figure = Figure(figsize=(WIDTH, 0.6 + 2.9 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), 2, squeeze=False, sharey="col")
    for (left, right), model in zip(axes, models, strict=True):
        for (name, label), colour in zip(SUB_LAYERS.items(), COLOURS, strict=False):
            for panel, values in (
                (left, getattr(model.contributions, name)),
                (right, getattr(model.contributions, f"{name}_cosine")),
            ):
                panel.plot(values, color=colour, marker="o", markersize=4, label=label)
        _by_layer(left, f"{model.label}: size relative to the stream")
        _by_layer(right, f"{model.label}: cosine with the stream")
        right.axhline(0, color=GREY, linewidth=1)
    axes[0, 0].set_yscale("log")  # the first layer adds to an embedding that may be tiny
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].legend(frameon=False, fontsize=9)
    return png_bytes(figure)


def draw_growth(models: list[Measured]) -> bytes:
    """The size of the stream after each layer over the embedding's, measured and predicted."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    for model, colour in zip(models, COLOURS, strict=False):
        name = f"{model.label}, " if len(models) > 1 else ""
        for values, style, what in (
            (model.growth.measured, "-", "measured"),
            (model.growth.independent, "--", "predicted, independent"),
            (model.growth.aligned, ":", "predicted, all the same way"),
        ):
            axes.plot([1.0, *values], style, color=colour, label=name + what)
    _by_layer(axes, "size of the stream over the embedding's", "layers before")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return png_bytes(figure)


def draw_skip_effects(models: list[Measured]) -> bytes:
    """What skipping a layer changes in each later layer: at all positions, and at later positions only."""
    figure = Figure(figsize=(WIDTH, 0.4 + 3.9 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), 2, squeeze=False)
    every = [effects for model in models for effects in (model.skipped, model.skipped_before)]
    most = max((x for e in every for row in e.later_max for x in row if x), default=1.0)
    image: Any = None
    for row, model in zip(axes, models, strict=True):
        for panel, effects, where in (
            (row[0], model.skipped, "all positions"),
            (row[1], model.skipped_before, "later positions"),
        ):
            image = _heat_map(panel, effects.later_max, f"{model.label}: {where}", most / 100, most)
            panel.set_xlabel("changed layer")
        row[0].set_ylabel("skipped layer")
    _colour_bar(figure, image, axes, "relative change of what the layer adds,\nmaximum over tokens")
    return png_bytes(figure)


def draw_skip_outputs(models: list[Measured]) -> bytes:
    """What skipping each layer changes in the output probabilities and in the loss."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for model, colour in zip(models, COLOURS, strict=False):
        name = f"{model.label}, " if len(models) > 1 else ""
        for effects, style, where in (
            (model.skipped, "-", "all positions"),
            (model.skipped_before, "--", "later positions"),
        ):
            options = {"color": colour, "linestyle": style, "marker": "o", "markersize": 4}
            # Later positions do not read the last layer, so its distance there is 0, which a logarithmic
            # axis cannot show.
            distances = [distance or math.nan for distance in effects.output_mean]
            left.plot(distances, label=name + where, **options)
            right.plot(effects.loss_increase, **options)
    _by_layer(left, "output probabilities: L2 distance, mean", "skipped layer")
    _by_layer(right, "loss increase, nats a token", "skipped layer")
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    right.set_yscale("symlog", linthresh=0.001)
    right.yaxis.set_major_formatter("{x:g}")
    right.axhline(0, color=GREY, linewidth=1)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return png_bytes(figure)


def draw_staleness(models: list[Measured]) -> bytes:
    """The increase of the loss when the residual of one layer is changed, for each layer."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        alone = model.conversion.alone
        axes.bar(list(alone), [loss - model.loss for loss in alone.values()], color=COLOURS[0])
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set_yscale("symlog", linthresh=0.001)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlim(-0.7, len(model.residual) - 0.3)
        _by_layer(axes, f"{model.label}: one layer made {model.conversion.to}")
    figure.supylabel("loss increase, nats a token", fontsize=10)
    return png_bytes(figure)


def draw_rules(models: list[Measured]) -> bytes:
    """The increase of the loss with two ways to choose N ladder layers: auto:N, and the last N.

    Args:
        models: the conversion of each has rules.
    """
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        rules = model.conversion.rules
        for label, losses, shift, colour in (
            ("auto:N", [r.chosen_loss for r in rules], -0.2, COLOURS[0]),
            ("last N", [r.last_loss for r in rules], 0.2, COLOURS[1]),
        ):
            places = [i + shift for i in range(len(rules))]
            increases = [loss - model.loss for loss in losses]
            bars = axes.bar(places, increases, 0.38, color=colour, label=label)
            axes.bar_label(bars, fmt="%+.4f", fontsize=8, padding=2)
        axes.axhline(0, color=GREY, linewidth=1)
        _by_layer(axes, f"{model.label}: N layers made {model.conversion.to}", "N")
        axes.set_xticks(range(len(rules)), [str(rule.count) for rule in rules])
        axes.margins(y=0.15)
    figure.supylabel("loss increase, nats a token", fontsize=10)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=9)
    return png_bytes(figure)


def draw_maps(first: Measured, second: Measured, errors: list[list[float]]) -> bytes:
    """The error of the best linear map to each layer of the first model from each layer of the second.

    Args:
        errors: [i][j], from `map_errors`.
    """
    figure = Figure(figsize=(WIDTH * 0.7, WIDTH * 0.58), layout="constrained")
    axes = figure.subplots()
    flat = [error for row in errors for error in row]
    image = _heat_map(axes, errors, "", min(flat), max(flat), log=False)
    axes.set_ylabel(f"after layer, {first.label}")
    axes.set_xlabel(f"after layer, {second.label}")
    _colour_bar(figure, image, axes, "relative error of the best linear map")
    return png_bytes(figure)


def _by_layer(axes: Any, title: str, label: str = "layer") -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(label)
    axes.grid(True, axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(NUMBERS_UP_TO, integer=True, min_n_ticks=1))


def _heat_map(
    axes: Any, values: Any, title: str, least: float, most: float, log: bool = True
) -> Any:
    """Draws a square for each value, dark where the value is large; None stays white."""
    rows = [[float("nan") if value is None else value for value in row] for row in values]
    limits = {"norm": LogNorm(least, most, clip=True)} if log else {"vmin": least, "vmax": most}
    image = axes.imshow(rows, cmap="viridis_r", aspect="equal", **limits)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[:].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(NUMBERS_UP_TO, integer=True, min_n_ticks=1))
    if max(len(rows), len(rows[0])) <= NUMBERS_UP_TO:
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    dark = image.norm(value) > 0.5
                    text = f"{value:.2f}".removeprefix("0") if value < 10 else f"{value:.0f}"
                    colour = "white" if dark else "black"
                    axes.text(x, y, text, ha="center", va="center", fontsize=6.5, color=colour)
    return image


def _colour_bar(figure: Figure, image: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=30, format="%g", label=label)
    bar.outline.set_visible(False)
