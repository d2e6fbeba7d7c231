"""Helpers that all pictures use: colours, units on axes, smoothed curves, PNG bytes."""

import io
import math

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours: most colour-blind people can tell them apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#666666"


def smooth(values: list[float]) -> list[float]:
    """The exponential moving average over about 1/25 of the values, with the bias at its start corrected.

    Values that are not finite leave the average as it was.
    """
    keep = 1 - 1 / max(1.0, len(values) / 25)
    total, weight, out = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total = keep * total + (1 - keep) * value if keep else value
            weight = keep * weight + (1 - keep) if keep else 1.0
        out.append(total / weight if weight else math.nan)
    return out


def si(value: float) -> str:
    """A number with an SI prefix: 1500000 becomes "1.5M"."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file's content, at 130 dots per inch."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
