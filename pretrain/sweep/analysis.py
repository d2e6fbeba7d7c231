"""What a sweep's losses say: best rates, laws, and predictions of what was not trained."""

import itertools
import math
import statistics
from dataclasses import dataclass, replace

import numpy as np

from pretrain.config.presets import OF_A_MODEL, PRESETS
from pretrain.sweep.fits.law import DRAWS, Fit, Point, fit_laws, interval, too_few
from pretrain.sweep.fits.rates import Best, RateLaw, Rates, best_rate, perturbed, rate_law
from pretrain.sweep.results import Result

_LEAST_FREE = 3  # degrees of freedom from which the spread of seeds says something


@dataclass(frozen=True)
class Noise:
    """Of a loss, as a share of it: a standard deviation."""

    share: float
    source: str
    of_seeds: bool = False
    """It is that of a single run. Else it is that of the points that the laws are fitted to, which are
    means over seeds already."""

    def of_mean(self, seeds: int) -> float:
        """Of a mean over so many seeds."""
        return self.share / math.sqrt(seeds) if self.of_seeds else self.share


@dataclass(frozen=True)
class Cell:
    """A size with a budget, in one kind."""

    kind: str
    size: str
    parameters: int
    tokens: int
    held_out: bool
    losses: Rates
    """By rate, the mean over seeds."""
    seeds: dict[float, int]
    """By rate, how many the mean is over."""
    best: Best
    rate_between: tuple[float, float] | None
    """The 90 % interval of the best rate; None at an edge, or where the noise is not known."""

    @property
    def point(self) -> Point:
        return Point(self.parameters, self.tokens, self.best.loss)

    def drawn(self, noise: Noise, random: np.random.Generator) -> float:
        """The best rate of other runs like these."""
        noises = {rate: noise.of_mean(seeds) for rate, seeds in self.seeds.items()}
        return best_rate(perturbed(self.losses, noises, random)).rate


@dataclass(frozen=True)
class KindsRates:
    """How the best rate of a kind goes with size."""

    law: RateLaw
    exponent_between: tuple[float, float] | None
    sizes: tuple[int, int]
    """The smallest and the largest with a best rate inside the rates tried."""

    @property
    def factor(self) -> float:
        """Best rate of the largest size over that of the smallest, by the law."""
        return self.law.rate(self.sizes[1]) / self.law.rate(self.sizes[0])


@dataclass(frozen=True)
class Prediction:
    """The loss of a model that the law was not fitted to."""

    kind: str
    name: str
    parameters: int
    tokens: int
    loss: float
    low: float
    high: float
    measured: float | None = None
    times: float = 1.0
    """Parameters over those of the largest size fitted."""

    @property
    def is_within(self) -> bool:
        """Whether what was measured is in the interval."""
        return self.measured is not None and self.low <= self.measured <= self.high


@dataclass(frozen=True)
class Analysis:
    """Everything that the page shows."""

    cells: list[Cell]
    noise: float | None
    """Of a run's loss, as a share of it: a standard deviation."""
    noise_source: str
    fits: dict[str, Fit]
    not_fitted: dict[str, str]
    """Why kinds have no law."""
    rates: dict[str, KindsRates]
    held_out: list[Prediction]
    presets: list[Prediction]
    step: float | None
    """The factor between neighbouring rates tried; None: there was one rate."""

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(cell.kind for cell in self.cells))


def analysed(results: list[Result]) -> Analysis:
    """Fits what can be fitted to the runs that are done.

    Raises:
        UserError: scipy is not installed, and there are enough points for a law.
    """
    cells = _cells(results)
    points: dict[str, list[Point]] = {}
    for cell in cells:
        points.setdefault(cell.kind, [])
        if not cell.held_out:
            points[cell.kind].append(cell.point)
    not_fitted = {kind: reason for kind, p in points.items() if (reason := too_few(p))}
    enough = {kind: p for kind, p in points.items() if kind not in not_fitted}
    fits = fit_laws(enough) if enough else {}
    noise = _noise(results, fits)
    if noise is not None:
        cells = [_with_interval(cell, noise) for cell in cells]
    return Analysis(
        cells=cells,
        noise=noise.share if noise else None,
        noise_source=noise.source if noise else "",
        fits=fits,
        not_fitted=not_fitted,
        rates=_rate_laws(cells, noise),
        held_out=_held_out(cells, fits),
        presets=_presets(points, fits),
        step=_step(cells),
    )


def _cells(results: list[Result]) -> list[Cell]:
    found: dict[tuple[str, int, int, str, bool], dict[float, list[float]]] = {}
    diverged: dict[tuple[str, int, int, str, bool], set[float]] = {}
    for run in sorted(results, key=lambda run: (run.parameters, run.tokens)):
        place = (run.kind, run.parameters, run.tokens, run.size, run.held_out)
        if run.loss is not None:
            found.setdefault(place, {}).setdefault(run.rate, []).append(run.loss)
        elif run.state == "diverged":
            diverged.setdefault(place, set()).add(run.rate)
    cells = []
    for place, by_rate in found.items():
        kind, parameters, tokens, size, held_out = place
        losses = {rate: statistics.fmean(of_rate) for rate, of_rate in sorted(by_rate.items())}
        seeds = {rate: len(by_rate[rate]) for rate in losses}
        best = best_rate(losses, diverged.get(place, set()) - set(losses))
        cells.append(Cell(kind, size, parameters, tokens, held_out, losses, seeds, best, None))
    return cells


def _noise(results: list[Result], fits: dict[str, Fit]) -> Noise | None:
    """The noise of losses: that of seeds, or else that of the laws' errors. None: there is neither."""
    by_run: dict[tuple[str, int, int, float], list[float]] = {}
    for run in results:
        if run.loss is not None:
            place = (run.kind, run.parameters, run.tokens, run.rate)
            by_run.setdefault(place, []).append(math.log(run.loss))
    several = [logs for logs in by_run.values() if len(logs) > 1]
    free = sum(len(logs) - 1 for logs in several)
    if free >= _LEAST_FREE:
        squares = sum(statistics.variance(logs) * (len(logs) - 1) for logs in several)
        return Noise(math.sqrt(squares / free), "the spread of seeds", of_seeds=True)
    if fits:
        return Noise(next(iter(fits.values())).noise, "the errors of the fits")
    return None


def _with_interval(cell: Cell, noise: Noise) -> Cell:
    if cell.best.edge:
        return cell
    random = np.random.default_rng(0)
    drawn = [cell.drawn(noise, random) for _ in range(DRAWS)]
    return replace(cell, rate_between=interval(drawn))


def _rate_laws(cells: list[Cell], noise: Noise | None) -> dict[str, KindsRates]:
    found = {}
    random = np.random.default_rng(0)
    for kind in dict.fromkeys(cell.kind for cell in cells):
        of_kind = [c for c in cells if c.kind == kind and not c.best.edge and not c.held_out]
        sizes = [cell.parameters for cell in of_kind]
        law = rate_law(sizes, [cell.best.rate for cell in of_kind])
        if law is None:
            continue
        between = None
        if noise is not None:
            exponents = []
            for _ in range(DRAWS):
                drawn = [cell.drawn(noise, random) for cell in of_kind]
                if drawn_law := rate_law(sizes, drawn):
                    exponents.append(drawn_law.exponent)
            between = interval(exponents)
        found[kind] = KindsRates(law, between, (min(sizes), max(sizes)))
    return found


def _held_out(cells: list[Cell], fits: dict[str, Fit]) -> list[Prediction]:
    found = []
    for cell in cells:
        if cell.held_out and cell.kind in fits:
            largest = max(c.parameters for c in cells if c.kind == cell.kind and not c.held_out)
            predicted = fits[cell.kind].predicted(cell.parameters, cell.tokens)
            place = (cell.kind, cell.size, cell.parameters, cell.tokens)
            times = cell.parameters / largest
            found.append(Prediction(*place, *predicted, measured=cell.best.loss, times=times))
    return found


def _presets(points: dict[str, list[Point]], fits: dict[str, Fit]) -> list[Prediction]:
    """Predictions of the presets that are larger than all sizes, trained on their own budgets."""
    found = []
    for name, preset in PRESETS.items():
        config = preset()
        if name in OF_A_MODEL or config.model.experts.num_moe_experts:
            continue
        parameters = config.model.num_parameters(embeddings=False)
        tokens = config.tokens_after(config.train_steps)
        for kind, fit in fits.items():
            times = parameters / max(point.parameters for point in points[kind])
            if times > 1:
                predicted = fit.predicted(parameters, tokens)
                found.append(Prediction(kind, name, parameters, tokens, *predicted, times=times))
    return found


def _step(cells: list[Cell]) -> float | None:
    """The largest factor between neighbouring rates of the finest grid."""
    finest = max((sorted(cell.losses) for cell in cells), key=len, default=[])
    pairs = [b / a for a, b in itertools.pairwise(finest)]
    return max(pairs, default=None)
