"""Scaling laws: the loss against parameters and tokens, L(N, D) = E + A / N^alpha + B / D^beta.

This is approach 3 of arXiv 2203.15556. The errors of the logarithm of the loss are minimised, under
Huber's loss, by scipy's least squares from several starting points. Huber's loss begins to discount errors
at 1 % and not at the paper's 0.1 %: the losses of small runs are noisier, and below that it would fit a
median through five of the points and ignore the others.

Uncertainty: as many sets of losses are drawn as `DRAWS`, each the fitted law with new errors, and the law
is fitted to each (a bootstrap of the errors; a sweep has too few points to draw among these, as arXiv
2404.10102 does). Kinds share the size of the errors. It is known from few points, so each set has its own,
drawn from what these allow (a chi-squared distribution): intervals are wider the fewer points there are.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from megatron_ladder.errors import UserError

Array = NDArray[np.float64]

DRAWS = 300
HUBER = 0.01
UNKNOWNS = 5
_LEVEL = 0.9  # of intervals
# Of log E, log A', log alpha, log B', log beta: A' and B' are the terms at the mean size and budget.
_LOW = np.array([-9.0, -12.0, math.log(0.01), -12.0, math.log(0.01)])
_HIGH = np.array([4.0, 4.0, math.log(3.0), 4.0, math.log(3.0)])


@dataclass(frozen=True)
class Point:
    """A model of N parameters, trained on D tokens, and its loss in nats a token."""

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Law:
    """E + A / N^alpha + B / D^beta."""

    e: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats a token."""
        return self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta


@dataclass(frozen=True)
class Fit:
    """A law, its errors, and other laws that the points allow."""

    law: Law
    errors: list[float]
    """log fitted loss - log loss, of each point."""
    draws: list[Law]
    noises: list[float]
    """Of each draw: the standard deviation of the errors that it was drawn with."""
    noise: float
    """The errors' standard deviation, all kinds together: a share of the loss."""

    def between(self, name: str) -> tuple[float, float]:
        """The 90 % interval of one of the law's numbers."""
        return interval([getattr(law, name) for law in self.draws])

    def predicted(self, parameters: float, tokens: float) -> tuple[float, float, float]:
        """The loss of a new run: the law's, and its 90 % interval, with the noise of a single run."""
        random = np.random.default_rng(1)
        drawn = [
            law.loss(parameters, tokens) * math.exp(noise * random.standard_normal())
            for law, noise in zip(self.draws, self.noises, strict=True)
        ]
        return self.law.loss(parameters, tokens), *interval(drawn)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The middle 90 %."""
    low, high = np.quantile(values, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def need_scipy() -> None:
    """Raises UserError where scipy is not installed."""
    if find_spec("scipy") is None:
        raise UserError(
            "fits need scipy, which is not installed: `pip install scipy`, or megatron-ladder[sweep]"
        )


def too_few(points: Sequence[Point]) -> str:
    """Why a law cannot be fitted to these points, in words; "": it can."""
    if len(points) <= UNKNOWNS:
        return (
            f"a law has {UNKNOWNS} unknowns, and there are {len(points)} points (a size with a budget): "
            f"{UNKNOWNS + 1} or more are needed"
        )
    sizes, budgets = {p.parameters for p in points}, {p.tokens for p in points}
    for found, what in ((sizes, "sizes"), (budgets, "budgets of tokens")):
        if len(found) < 3:
            return f"there are {len(found)} {what}: 3 or more are needed, to tell a curve from a constant"
    place = np.log([[p.parameters, p.tokens] for p in points])
    spread = np.linalg.svd(place - place.mean(axis=0), compute_uv=False)
    if spread[1] < 0.02 * spread[0]:
        return (
            "every size has the same tokens per parameter, so the effect of size and that of tokens cannot "
            "be told apart: give each size several budgets"
        )
    return ""


def fit_laws(kinds: dict[str, list[Point]], draws: int = DRAWS) -> dict[str, Fit]:
    """The law of each kind.

    Args:
        kinds: points by kind, each enough for a law (`too_few`).
        draws: of the bootstrap.

    Raises:
        UserError: scipy is not installed, or there are too few points.
    """
    need_scipy()
    for kind, points in kinds.items():
        if reason := too_few(points):
            raise UserError(f"{kind or 'the sweep'}: {reason}")
    fitted = {kind: _fit(points) for kind, points in kinds.items()}
    errors = {kind: _errors(fitted[kind][1], points) for kind, points in kinds.items()}
    free = sum(len(e) - UNKNOWNS for e in errors.values())
    noise = math.sqrt(sum(float(e @ e) for e in errors.values()) / free)
    random = np.random.default_rng(0)
    found = {}
    for kind, points in kinds.items():
        law, best = fitted[kind]
        noises = noise * np.sqrt(free / random.chisquare(free, draws))
        drawn = []
        for size in noises:
            new = np.exp(size * random.standard_normal(len(points)))
            others = [
                Point(p.parameters, p.tokens, law.loss(p.parameters, p.tokens) * float(f))
                for p, f in zip(points, new, strict=True)
            ]
            drawn.append(_refit(others, best, law)[0])
        found[kind] = Fit(law, [float(e) for e in errors[kind]], drawn, noises.tolist(), noise)
    return found


def _fit(points: Sequence[Point]) -> tuple[Law, Array]:
    """The best law from several starting points, and its unknowns as least squares has them."""
    least = min(point.loss for point in points)
    starts = [
        np.log([e * least, (1 - e) * least / 2, alpha, (1 - e) * least / 2, beta])
        for e, alpha, beta in itertools.product(
            (0.2, 0.5, 0.85), (0.15, 0.4, 0.9), (0.15, 0.4, 0.9)
        )
    ]
    found = [_least_squares(points, start) for start in starts]
    _, best = min(found, key=lambda pair: pair[0])
    return _law(best, points), best


def _refit(points: Sequence[Point], best: Array, law: Law) -> tuple[Law, Array]:
    """The same, from two starting points: the law that the points were drawn with, and a smaller E."""
    other = best.copy()
    other[0] = math.log(max(law.e, 1e-3) / 2)
    found = [_least_squares(points, start) for start in (best, other)]
    _, best = min(found, key=lambda pair: pair[0])
    return _law(best, points), best


def _least_squares(points: Sequence[Point], start: Array) -> tuple[float, Array]:
    """The cost and the unknowns where it is least."""
    from scipy.optimize import least_squares  # an extra

    n, d = _centred(points)
    observed = np.log([point.loss for point in points])

    def errors(unknowns: Array) -> Array:
        parts = _parts(unknowns, n, d)
        return np.log(parts.sum(axis=0)) - observed

    def slopes(unknowns: Array) -> Array:
        parts = _parts(unknowns, n, d)
        share = parts / parts.sum(axis=0)
        alpha, beta = np.exp(unknowns[[2, 4]])
        return np.stack(
            [share[0], share[1], -alpha * n * share[1], share[2], -beta * d * share[2]], axis=1
        )

    inside = np.clip(start, _LOW + 1e-6, _HIGH - 1e-6)
    found = least_squares(
        errors, inside, slopes, bounds=(_LOW, _HIGH), loss="huber", f_scale=HUBER, max_nfev=300
    )
    return float(found.cost), found.x


def _parts(unknowns: Array, n: Array, d: Array) -> Array:
    """E and the two other terms at each point: [3, points]."""
    e, a, alpha, b, beta = unknowns
    return np.exp(np.stack([np.full_like(n, e), a - math.exp(alpha) * n, b - math.exp(beta) * d]))


def _centred(points: Sequence[Point]) -> tuple[Array, Array]:
    """log N and log D, less their means: then the unknowns depend little on each other."""
    n = np.log([point.parameters for point in points])
    d = np.log([point.tokens for point in points])
    return n - n.mean(), d - d.mean()


def _law(unknowns: Array, points: Sequence[Point]) -> Law:
    n = float(np.mean(np.log([point.parameters for point in points])))
    d = float(np.mean(np.log([point.tokens for point in points])))
    e, a, alpha, b, beta = map(float, unknowns)
    alpha, beta = math.exp(alpha), math.exp(beta)
    return Law(math.exp(e), math.exp(a + alpha * n), alpha, math.exp(b + beta * d), beta)


def _errors(unknowns: Array, points: Sequence[Point]) -> Array:
    n, d = _centred(points)
    return np.log(_parts(unknowns, n, d).sum(axis=0)) - np.log([p.loss for p in points])
