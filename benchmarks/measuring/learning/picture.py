"""Loss against tokens, measured, and against a large shape's modelled time."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from measuring.learning.kinds import KINDS
from measuring.learning.modelled_time import TP, Target
from measuring.learning.runs import Run, mean_and_spread, smoothed, validation
from measuring.pictures import plain
from pretrain.pictures import COLOURS, png_bytes, si

UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))


def draw(runs: dict[str, list[Run]], targets: list[Target]) -> bytes:
    """The left panel has loss against tokens, the others the same losses against a target's time.

    Of models with experts the last one has the load of the fullest expert, against tokens.
    """
    balance = "load_balance" in next(iter(runs.values()))[0]
    count = 1 + len(targets) + balance
    figure = Figure(figsize=(6.5 * count, 5.2), layout="constrained")
    left, *others = figure.subplots(1, count, squeeze=False)[0]
    for axes in others[: len(targets)]:
        axes.sharey(left)
    if balance:
        _balance(others.pop(), runs)
    tokens = next(iter(runs.values()))[0]["training"]["tokens"][-1]
    shown = _curves(left, runs, dict.fromkeys(runs, 1.0))
    left.set_ylabel("loss, nats a token")
    left.set_xlabel("tokens trained on")
    left.set_title("Measured. Lines: training, smoothed. Points: validation", fontsize=10)
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
    for axes, target in zip(others, targets, strict=True):
        token_s = {kind: target.token_s(kind) for kind in runs}
        longest = tokens * max(token_s.values())
        unit, name = next(u for u in UNITS if longest > 2 * u[0] or u[0] == 1)
        _curves(axes, runs, {kind: seconds / unit for kind, seconds in token_s.items()})
        axes.set_xlabel(
            f"{name} that {target.name} would take for as many tokens on {target.where}, TP {TP}"
        )
        axes.set_title(
            "The same losses against a large shape's wall-clock: MODELLED, not measured",
            fontsize=10,
        )
    # The limits are those of the validation losses: the first steps' losses are far above.
    margin = 0.08 * (max(shown) - min(shown)) + 0.01
    for axes in (left, *others):
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
        axes.set_xlim(left=0)
        plain(axes)
    seeds = len(next(iter(runs.values())))
    title = "validation loss at the end" + (f", mean of {seeds} seeds" if seeds > 1 else "")
    left.legend(frameon=False, fontsize=9, title=title)
    return png_bytes(figure)


def _balance(axes: Axes, runs: dict[str, list[Run]]) -> None:
    """Draws the load of the fullest expert of the layer where it is largest."""
    for kind, of_kind in runs.items():
        colour = dict(zip(KINDS, COLOURS, strict=False))[kind]
        curves = [
            dict(
                zip(run["training"]["tokens"], run["load_balance"]["expert_imbalance"], strict=True)
            )
            for run in of_kind
        ]
        tokens, mean, low, high = mean_and_spread(curves)
        axes.plot(tokens, mean, color=colour, linewidth=1, label=kind)
        axes.fill_between(tokens, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_ylabel("tokens of the fullest expert over the mean")
    axes.set_xlabel("tokens trained on")
    axes.set_title("Measured. The layer with the largest; bands: the seeds' range", fontsize=10)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
    axes.set_xlim(left=0)
    plain(axes)
    axes.legend(frameon=False, fontsize=9)


def _curves(axes: Axes, runs: dict[str, list[Run]], scales: dict[str, float]) -> list[float]:
    """Draws them over tokens times their kind's scale; returns the validation losses shown."""
    shown: list[float] = []
    for kind, of_kind in runs.items():
        colour = dict(zip(KINDS, COLOURS, strict=False))[kind]
        tokens, mean, low, high = mean_and_spread([smoothed(run) for run in of_kind])
        at, v_mean, v_low, v_high = mean_and_spread([validation(run) for run in of_kind])
        label = f"{kind}: {v_mean[-1]:.3f}"
        if len(of_kind) > 1:
            label += f" ({v_low[-1]:.3f} to {v_high[-1]:.3f})"
        x, points = ([t * scales[kind] for t in places] for places in (tokens, at))
        axes.plot(x, mean, color=colour, linewidth=1)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        # A point, and the seeds' range as a bar through it.
        axes.plot(points, v_mean, "o", color=colour, markersize=4, label=label)
        axes.vlines(points, v_low, v_high, color=colour)
        shown += v_low + v_high
    return shown
