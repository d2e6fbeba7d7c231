"""What the inference benchmark makes of its times, by hand."""

import pytest

from measuring.inference.plan import KINDS, SHAPES, generation_seconds, modelled_pass
from measuring.inference.report import (
    PAPER,
    figures,
    hidden_of_rates,
    modelled_figures,
    tables,
    whole,
)

TIMES = {
    ("standard", "link"): [14.0, 24.0, 15.0],  # one slow repetition, of both
    ("standard", "zero"): [10.0, 20.0, 10.5],
    ("parallel", "link"): [11.0, 11.0, 11.0],
    ("parallel", "zero"): [9.0, 9.0, 9.0],
    ("ladder", "link"): [10.4, 30.4, 10.4],
    ("ladder", "zero"): [10.0, 30.0, 10.0],
    ("no-comm", "zero"): [8.0, 8.0, 9.0],
}


def test_shares_and_speed_ups_are_of_what_the_link_adds() -> None:
    found = figures(TIMES)
    assert found["hidden_share"] == pytest.approx({"parallel": 0.5, "ladder": 0.9})
    speed_ups = {"standard": 1, "parallel": 12 / 10, "ladder": 12 / 8.4, "no-comm": 12 / 8}
    assert found["speed_up"] == pytest.approx(speed_ups)
    relative = {"standard": 1.5, "parallel": 1.25, "ladder": 1.05, "no-comm": 1}
    assert found["raw_speed_up"] == pytest.approx({"parallel": 15 / 11, "ladder": 15 / 10.4})
    assert found["relative_time"] == pytest.approx(relative)
    # Those of ladder's differences are 0.4 each time, of standard's 4, 4 and 4.5.
    error = found["hidden_share_error"]["ladder"]
    assert 0 < error < 0.4 / 4 - 0.4 / 4.5


def test_an_alternatives_own_compute_counts() -> None:
    times = {
        **TIMES,
        ("ladder, 8-bit sums", "link"): [10.9, 31.0, 11.0],
    }  # over ladder's 10, 30, 10
    speed_up = figures(times)["speed_up"]
    assert speed_up["ladder, 8-bit sums"] == pytest.approx(12 / 9)
    assert "ladder, in two parts" not in speed_up
    case = {**result("decode"), **figures(times)}
    text = tables({"cases": [case, result("decode")], "whole": []})
    assert "| measured speed-up | batch | parallel | ladder | ladder, 8-bit sums |" in text
    assert "| decode, 70b, nvswitch | 4 | 1.20 | 1.43 | 1.33 |\n" in text
    assert "| decode, 70b, nvswitch | 4 | 1.20 | 1.43 |  |\n" in text


def result(phase: str) -> dict:
    modelled = modelled_pass(SHAPES["70b"], phase, batch=4, link="nvswitch")
    parts = vars(modelled) | modelled_figures(modelled)
    case = {"shape": "70b", "link": "nvswitch", "batch": 4, "phase": phase}
    return {**case, "modelled": parts, **figures(TIMES)}


def test_a_whole_generation_has_the_models_compute_and_the_measured_shares() -> None:
    results = [result("prefill"), result("decode")]
    (line,) = whole(results)
    computed = [r["modelled"]["pass_s"]["no-comm"] for r in results]
    for kind, relative in (("standard", 1.5), ("ladder", 1.05)):
        seconds = generation_seconds(SHAPES["70b"], 4, *(relative * s for s in computed))
        assert line["tokens_per_s"][kind] == pytest.approx(4 * 512 / seconds)
    assert line["paper"]["ladder"] == 331.45
    assert whole(results[:1]) == []
    text = tables({"cases": results, "whole": [line]})
    assert "| decode, 70b, nvswitch | 4 | 39, 74, 23 | 1.20 | 1.43 | 1.50 | 0.50 +- " in text
    assert "measured speed-up" not in text
    assert "| 1.19 | 1.28 | 1.38 |" in text and "| 0.90 | 0.80 |" in text  # hidden
    assert "| decode, 70b, nvswitch | 4 | 1.17 | 1.41 |" in text


def test_the_papers_hidden_shares() -> None:
    rates = PAPER["70b", "nvswitch"]
    shares = [hidden_of_rates(dict(zip(KINDS, rates[b], strict=True))) for b in (1, 4, 16, 64)]
    assert shares == pytest.approx([0.78, 0.81, 0.67, 0.62], abs=0.01)
