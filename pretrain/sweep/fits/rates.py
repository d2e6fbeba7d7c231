"""The best learning rate of a model, from runs at several rates."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

Rates = dict[float, float]
"""Losses by learning rate, in nats a token."""


@dataclass(frozen=True)
class Best:
    """The best rate, and the loss that a run at it would have."""

    rate: float
    loss: float
    edge: str = ""
    """lowest, highest: the best rate tried has no rate tried beyond it, so the best may lie there. only:
    there was one rate. diverged: the next rate beyond it diverged."""
    diverged: float | None = None
    """That rate."""


def best_rate(losses: Rates, diverged: Collection[float] = ()) -> Best:
    """The vertex of the parabola in log rate through the best rate and its two neighbours.

    At the edge of the rates tried there is no such parabola: then it is the best rate tried.

    Args:
        diverged: rates at which no run has a loss, because training diverged.
    """
    rates = sorted(losses)
    place = min(range(len(rates)), key=lambda i: losses[rates[i]])
    edge = {0: "lowest", len(rates) - 1: "highest"}.get(place, "")
    beyond = min((rate for rate in diverged if rate > rates[place]), default=None)
    if edge:
        best = rates[place], losses[rates[place]]
        if len(rates) == 1:
            return Best(*best, "only" if beyond is None else "lowest")
        if edge == "highest" and beyond is not None:
            return Best(*best, "diverged", beyond)
        return Best(*best, edge)
    three = rates[place - 1 : place + 2]
    x = np.log(three) - math.log(rates[place])
    curve = np.polyfit(x, [losses[rate] for rate in three], 2)
    if curve[0] <= 0:  # all three are equal
        return Best(rates[place], losses[rates[place]])
    vertex = float(np.clip(-curve[1] / (2 * curve[0]), x[0], x[2]))
    return Best(rates[place] * math.exp(vertex), float(np.polyval(curve, vertex)))


def perturbed(losses: Rates, noises: Rates, random: np.random.Generator) -> Rates:
    """The losses of other runs like these.

    Args:
        noises: by rate, by how much logarithms of losses differ (a standard deviation).
    """
    drawn = random.standard_normal(len(losses))
    return {
        rate: loss * math.exp(noises[rate] * x)
        for (rate, loss), x in zip(losses.items(), drawn, strict=True)
    }


@dataclass(frozen=True)
class RateLaw:
    """Best rate = rate_at * (N / parameters)^exponent."""

    rate_at: float
    parameters: float
    """The geometric mean of the sizes."""
    exponent: float

    def rate(self, parameters: float) -> float:
        """The best rate of a model with so many parameters."""
        return self.rate_at * (parameters / self.parameters) ** self.exponent


def rate_law(sizes: Sequence[float], rates: Sequence[float]) -> RateLaw | None:
    """A power law through best rates, by least squares of logarithms; None: of fewer than two sizes."""
    if len(set(sizes)) < 2:
        return None
    x = np.log(sizes)
    exponent, level = np.polyfit(x - x.mean(), np.log(rates), 1)
    return RateLaw(math.exp(level), math.exp(x.mean()), float(exponent))
