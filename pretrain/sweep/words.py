"""What a sweep has found, in sentences and tables of text: for the page and for the terminal."""

import math
from collections.abc import Sequence

from pretrain.sizes import in_units
from pretrain.sweep.analysis import Analysis, Cell, Prediction
from pretrain.sweep.fits.law import Fit

Row = list[str]
RATES = ["kind", "size", "parameters", "tokens", "best rate", "90 % interval", "loss"]
LAWS = ["kind", "E", "A", "alpha", "B", "beta", "mean error"]
HELD_OUT = ["kind", "size", "parameters", "tokens", "predicted", "90 % interval", "measured", ""]
PRESETS = ["kind", "preset", "parameters", "tokens", "predicted", "90 % interval"]
_EDGES = {
    "lowest": "{rate:.3g} or lower",
    "highest": "{rate:.3g} or higher",
    "only": "{rate:.3g}, the only one",
    "diverged": "{rate:.3g}; {diverged:.3g} diverged",
}


def rate_rows(found: Analysis) -> list[Row]:
    """A row for each kind, size and budget."""
    return [[*_place(cell.kind, cell.size, cell), *_rate(cell)] for cell in found.cells]


def law_rows(found: Analysis) -> list[Row]:
    """A row for each kind that has a law; intervals in brackets."""
    rows = []
    for kind, fit in found.fits.items():
        numbers = [_number(fit, name) for name in ("e", "a", "alpha", "b", "beta")]
        mean = math.fsum(map(abs, fit.errors)) / len(fit.errors)
        rows.append([kind or "all", *numbers, f"{mean:.2%}"])
    return rows


def held_out_rows(found: Analysis) -> list[Row]:
    """A row for each prediction of a size that was held out, and whether it was right."""
    return [
        [
            *_place(p.kind, p.name, p),
            *_predicted(p),
            f"{p.measured:.4f}",
            "inside" if p.is_within else f"a miss, by {_miss(p):.4f}",
        ]
        for p in found.held_out
        if p.measured is not None
    ]


def preset_rows(found: Analysis) -> list[Row]:
    """A row for each preset and kind."""
    return [[*_place(p.kind, p.name, p), *_predicted(p)] for p in found.presets]


def warnings(found: Analysis) -> list[str]:
    """Sentences about what the tables cannot be relied on for."""
    by_reason: dict[str, list[str]] = {}
    for kind, reason in found.not_fitted.items():
        by_reason.setdefault(reason, []).append(kind or "this sweep")
    lines = [f"No law for {'; '.join(kinds)}: {reason}." for reason, kinds in by_reason.items()]
    if found.presets:
        far, fitted = max(p.times for p in found.presets), _largest(found)
        names = ", ".join(dict.fromkeys(p.name for p in found.presets))
        lines.append(
            f"The presets are extrapolated: {names} have up to "
            f"{far:,.0f} times the parameters of the largest size fitted ({in_units(fitted)}), that is "
            f"{math.log10(far):.1f} orders of magnitude. Intervals have the noise of the runs alone. They "
            "do not say how wrong the law's form is so far away, nor a rate, a shape or a batch size that "
            "does not suit the large model. Losses are those of this data set and tokenizer."
        )
    return lines


def rate_sentences(found: Analysis) -> list[str]:
    """How the best rate goes with size, for each kind."""
    lines = []
    for kind, rates in found.rates.items():
        small, large = rates.sizes
        between = rates.exponent_between
        interval = f" ({between[0]:+.2f} to {between[1]:+.2f})" if between else ""
        lines.append(
            f"{kind or 'all'}: the best rate goes as N^{rates.law.exponent:+.2f}{interval}: from "
            f"{in_units(small)} to {in_units(large)} parameters it changes by a factor of "
            f"{rates.factor:.2g}"
            + (f", and neighbouring rates tried differ by {found.step:.2g}" if found.step else "")
            + "."
        )
    return lines


def summary(found: Analysis) -> str:
    """All of it as text."""
    parts = [_text(RATES, rate_rows(found)), *rate_sentences(found)]
    for titles, rows in (
        (LAWS, law_rows(found)),
        (HELD_OUT, held_out_rows(found)),
        (PRESETS, preset_rows(found)),
    ):
        if rows:
            parts += ["", _text(titles, rows)]
    return "\n".join([*parts, *warnings(found)])


def _text(titles: Sequence[str], rows: list[Row]) -> str:
    table = [list(titles), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(titles))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def _place(kind: str, name: str, of: Cell | Prediction) -> Row:
    return [kind or "all", name or "-", in_units(of.parameters), in_units(of.tokens)]


def _rate(cell: Cell) -> Row:
    rate = _EDGES.get(cell.best.edge, "{rate:.3g}").format(
        rate=cell.best.rate, diverged=cell.best.diverged
    )
    between = cell.rate_between
    return [
        rate,
        f"{between[0]:.2g} to {between[1]:.2g}" if between else "-",
        f"{cell.best.loss:.4f}",
    ]


def _predicted(p: Prediction) -> Row:
    return [f"{p.loss:.4f}", f"{p.low:.4f} to {p.high:.4f}"]


def _miss(p: Prediction) -> float:
    assert p.measured is not None
    return max(p.low - p.measured, p.measured - p.high)


def _number(fit: Fit, name: str) -> str:
    low, high = fit.between(name)
    return f"{getattr(fit.law, name):.3g} ({low:.2g} to {high:.2g})"


def _largest(found: Analysis) -> int:
    return max(cell.parameters for cell in found.cells if not cell.held_out)
