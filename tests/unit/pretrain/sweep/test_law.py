"""Fits to losses of a law that is known."""

import math

import numpy as np
import pytest

from megatron_ladder.errors import UserError
from pretrain.sweep.fits.law import Law, Point, fit_laws, interval, too_few
from pretrain.sweep.fits.rates import best_rate, perturbed, rate_law

pytest.importorskip("scipy")

TRUE = Law(e=1.7, a=400.0, alpha=0.34, b=410.0, beta=0.28)  # near arXiv 2203.15556's
SIZES, BUDGETS = (1e7, 3e7, 1e8, 3e8), (2e8, 6e8, 2e9, 6e9)
UNKNOWNS = ("e", "a", "alpha", "b", "beta")


def points(noise: float, seed: int = 0, law: Law = TRUE) -> list[Point]:
    random = np.random.default_rng(seed)
    return [
        Point(n, d, law.loss(n, d) * math.exp(noise * random.standard_normal()))
        for n in SIZES
        for d in BUDGETS
    ]


def test_a_law_without_noise_is_found_again() -> None:
    found = fit_laws({"": points(0.0)}, draws=2)[""].law
    for name in UNKNOWNS:
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-3), name


def test_a_law_with_noise_is_in_its_intervals() -> None:
    """For two draws of the noise. Of 90 % intervals not all hold what they should: the slow test counts."""
    other = Law(e=2.2, a=300.0, alpha=0.34, b=500.0, beta=0.28)
    fits = fit_laws({"one": points(0.003, 3), "other": points(0.003, 4, other)}, draws=40)
    for kind, law in (("one", TRUE), ("other", other)):
        for name in UNKNOWNS:
            low, high = fits[kind].between(name)
            assert low <= getattr(law, name) <= high, (kind, name)
        # A model ten times as large, on ten times the tokens.
        loss, low, high = fits[kind].predicted(3e9, 6e10)
        assert low < law.loss(3e9, 6e10) < high
        assert 0 < high - low < 0.1 * loss
    assert fits["one"].noise == fits["other"].noise == pytest.approx(0.003, rel=0.5)


@pytest.mark.slow
def test_intervals_hold_what_they_say() -> None:
    """90 % intervals of 40 fits to 9 points: a binomial with 0.9 is below 30 once in a thousand."""
    hits = dict.fromkeys((*UNKNOWNS, "predicted"), 0)
    random = np.random.default_rng(7)
    for _ in range(40):
        few = [
            Point(n, d, TRUE.loss(n, d) * math.exp(0.003 * random.standard_normal()))
            for n in SIZES[:3]
            for d in BUDGETS[:3]
        ]
        fit = fit_laws({"": few}, draws=60)[""]
        for name in UNKNOWNS:
            low, high = fit.between(name)
            hits[name] += low <= getattr(TRUE, name) <= high
        _, low, high = fit.predicted(SIZES[3], BUDGETS[3])
        new = TRUE.loss(SIZES[3], BUDGETS[3]) * math.exp(0.003 * random.standard_normal())
        hits["predicted"] += low <= new <= high
    assert min(hits.values()) >= 30, hits


def test_an_outlier_counts_little() -> None:
    wrong = points(0.0)
    wrong[5] = Point(
        wrong[5].parameters, wrong[5].tokens, 1.3 * wrong[5].loss
    )  # a run that diverged
    found = fit_laws({"": wrong}, draws=2)[""].law
    assert found.loss(3e8, 6e9) == pytest.approx(TRUE.loss(3e8, 6e9), rel=0.01)


@pytest.mark.parametrize(
    ("few", "reason"),
    [
        (points(0.0)[:5], "there are 5 points"),
        ([p for p in points(0.0) if p.parameters < 5e7], "there are 2 sizes: 3 or more"),
        ([p for p in points(0.0) if p.tokens < 1e9], "there are 2 budgets of tokens: 3 or more"),
        (
            [Point(n, 20 * n, 3.0 - i / 10) for i, n in enumerate(np.geomspace(1e6, 1e8, 7))],
            "every size has the same tokens per parameter",
        ),
    ],
)
def test_too_few_points_are_refused_in_words(few: list[Point], reason: str) -> None:
    assert reason in too_few(few)
    with pytest.raises(UserError, match=reason):
        fit_laws({"ladder": few})


def test_enough_points_are_not_refused() -> None:
    assert too_few(points(0.0)) == ""


def test_the_best_rate_is_a_parabolas_vertex() -> None:
    def loss(rate: float) -> float:
        return 3.0 + 0.2 * math.log(rate / 3e-3) ** 2

    best = best_rate({rate: loss(rate) for rate in (5e-4, 1e-3, 2e-3, 8e-3)})
    assert (best.rate, best.loss, best.edge) == (pytest.approx(3e-3), pytest.approx(3.0), "")
    # The neighbours of the best alone count, whatever is beyond them.
    assert best_rate(
        {1e-3: loss(1e-3), 2e-3: loss(2e-3), 8e-3: loss(8e-3), 1.0: 50.0}
    ).rate == pytest.approx(3e-3)


def test_a_best_rate_at_the_edge_is_said_to_be_there() -> None:
    assert best_rate({1e-3: 3.0, 2e-3: 3.1, 4e-3: 3.2}).edge == "lowest"
    assert best_rate({1e-3: 3.2, 2e-3: 3.1, 4e-3: 3.0}).edge == "highest"
    assert best_rate({1e-3: 3.2}).edge == "only"
    assert best_rate({1e-3: 3.0, 2e-3: 3.0, 4e-3: 3.1}).edge == "lowest"


def test_noise_is_a_share_of_the_loss() -> None:
    random = np.random.default_rng(0)
    drawn = [perturbed({1.0: 4.0}, {1.0: 0.01}, random)[1.0] for _ in range(2000)]
    assert np.std(np.log(drawn)) == pytest.approx(0.01, rel=0.1)
    assert np.mean(drawn) == pytest.approx(4.0, rel=1e-3)
    low, high = interval(drawn)
    assert (low, high) == (
        pytest.approx(4 * math.exp(-0.01645), rel=2e-3),
        pytest.approx(4 * math.exp(0.01645), rel=2e-3),
    )


def test_the_best_rates_power_law() -> None:
    law = rate_law([1e6, 1e7, 1e8], [4e-3 * n**-0.2 for n in (1e6, 1e7, 1e8)])
    assert law is not None
    assert law.exponent == pytest.approx(-0.2)
    assert law.rate(1e9) == pytest.approx(4e-3 * 1e9**-0.2)
    assert rate_law([1e6, 1e6], [1e-3, 2e-3]) is None
