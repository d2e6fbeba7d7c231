"""Best rates of a sweep: what diverged beyond them, and intervals of means over seeds."""

import math

import pytest

from pretrain.sweep.analysis import Analysis, analysed
from pretrain.sweep.fits.rates import best_rate
from pretrain.sweep.results import Result
from pretrain.sweep.words import rate_rows

SPREAD = 0.01
RATES = (1e-3, 2e-3, 4e-3)


def run(rate: float, seed: int, loss: float | None, size: str = "small") -> Result:
    return Result(
        name=f"{size} {rate} {seed}",
        size=size,
        kind="ladder",
        rate=rate,
        seed=seed,
        parameters=1000,
        tokens=20_000,
        held_out=False,
        state="diverged" if loss is None else "done",
        loss=loss,
    )


def spread_over(seeds: int, size: str = "small") -> list[Result]:
    """Three rates on a flat parabola; losses of pairs of seeds lie as far above as below."""
    deviation = SPREAD * math.sqrt((seeds - 1) / seeds) if seeds > 1 else 0.0
    return [
        run(rate, seed, loss * math.exp(deviation * (-1) ** seed), size)
        for rate, loss in zip(RATES, (3.01, 3.0, 3.01), strict=True)
        for seed in range(seeds)
    ]


def width(found: Analysis, place: int = 0) -> float:
    between = found.cells[place].rate_between
    assert between is not None
    return math.log(between[1] / between[0])


def test_a_mean_over_more_seeds_has_a_narrower_interval() -> None:
    """The best rate follows the noise of the losses: with 16 times the seeds about a quarter of it."""
    few, many = analysed(spread_over(4)), analysed(spread_over(64))
    assert few.noise_source == many.noise_source == "the spread of seeds"
    assert (few.noise, many.noise) == pytest.approx((SPREAD, SPREAD))
    assert width(many) == pytest.approx(width(few) / 4, rel=0.35)
    # A size with one seed has the noise of one run, though other sizes tell how large that is.
    mixed = analysed([*spread_over(64), *spread_over(1, "alone")])
    assert width(mixed, 0) < 0.5 * width(mixed, 1)


def test_a_rate_that_diverged_is_named_in_place_of_the_edge() -> None:
    done = {1e-3: 3.2, 2e-3: 3.1, 4e-3: 3.0}
    best = best_rate(done, diverged={8e-3, 16e-3})
    assert (best.rate, best.edge, best.diverged) == (4e-3, "diverged", 8e-3)
    # Below the best, and beside a best that has both neighbours, it says nothing.
    assert best_rate(done, diverged={5e-4}).edge == "highest"
    assert best_rate({**done, 5e-3: 3.3}, diverged={8e-3}).edge == ""
    # One rate, or the lowest: lower ones may be better.
    assert best_rate({1e-3: 3.2}, diverged={2e-3}).edge == "lowest"
    assert best_rate({1e-3: 3.2, 2e-3: 3.3}, diverged={4e-3}).edge == "lowest"


def test_the_table_names_the_rate_that_diverged() -> None:
    results = [run(rate, 1, loss) for rate, loss in ((2e-3, 3.1), (4e-3, 3.0), (8e-3, None))]
    assert rate_rows(analysed(results))[0][4] == "0.004; 0.008 diverged"
    assert rate_rows(analysed(results[:2]))[0][4] == "0.004 or higher"
    # Of two seeds one has a loss: then the rate counts, by that one.
    results.append(run(8e-3, 2, 3.05))
    assert "diverged" not in rate_rows(analysed(results))[0][4]
