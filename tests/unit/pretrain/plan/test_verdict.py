"""Does it pay? The answer of `bench plan`, from layouts' times by hand and from plans."""

from dataclasses import replace
from typing import Any

import pytest

from pretrain.config.presets import PRESETS
from pretrain.plan import verdict as module
from pretrain.plan.links import network_of
from pretrain.plan.planner import DEVICES, Hardware
from pretrain.plan.search import Row, fitting, ranked
from pretrain.plan.verdict import LEARNED_WORST, enough, lead, outcome, variants, verdict

HARDWARE = Hardware(DEVICES["h100"], network_of(400))
BASE = Row(
    residual="standard",
    halves=False,
    tp=8,
    cp=1,
    pp=1,
    last_stage=8,
    vpp=1,
    dp=1,
    ep=1,
    sequence_parallel=True,
    micro_batch_size=2,
    recompute="none",
    step_s=1.2,
    compute_s=1.0,
    exposed_tp_s=0.2,
    exposed_cp_s=0.0,
    exposed_ep_s=0.0,
    exposed_dp_s=0.0,
    transfers_s=0.0,
    bubble_s=0.0,
    tokens_per_s_per_gpu=1.0,
    mfu=0.5,
    memory_gb=70.0,
)


def found(**changes: dict[str, Any]) -> dict[str, list[Row]]:
    """One layout of each way: standard 1.2 s, in halves 1.1, parallel 1.15, ladder 1.05, the last 1.0."""
    given = {
        "standard": BASE,
        "standard, halves": replace(BASE, halves=True, step_s=1.1),
        "parallel": replace(BASE, residual="parallel", step_s=1.15),
        "ladder": replace(BASE, residual="ladder", step_s=1.05),
        "parallel-ladder": replace(BASE, residual="parallel-ladder", step_s=1.0),
    }
    return {n: [replace(r, **changes.get(n.replace("-", "_"), {}))] for n, r in given.items()}


def answer(monkeypatch: pytest.MonkeyPatch, times: dict[str, list[Row]], other: Any = None) -> str:
    """The paragraphs, where each variant of the hardware gives `other`, or the same times."""
    monkeypatch.setattr(module, "ranked", lambda *_: other or times)
    return "\n".join(verdict({}, times, 8, HARDWARE))


def test_the_fastest_rival_counts_and_all_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    times = found()
    assert lead(times) == pytest.approx(0.1)
    said = answer(monkeypatch, times)
    assert said.startswith("By this model of a step a ladder kind pays here.")
    for words in (
        "parallel-ladder (TP 8) is 20.0% faster than standard (TP 8), 10.0% faster than standard in halves",
        "15.0% faster than parallel",
        "The lead of parallel-ladder over the fastest rival is 10.0%; 10.0% with twice the link's",
        "A faster link does not change the answer, up to 32 times the bandwidth.",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("step_s", "words"),
    [
        (1.03, "ladder (TP 8) is 6.8% faster than the fastest rival, so ladder pays."),
        (
            1.05,
            "is 4.8% faster than the fastest rival, so ladder leads by less than the model's error.",
        ),
        (1.0999, "ladder (TP 8) is as fast as the fastest rival, so ladder does not pay."),
        (1.2, "ladder (TP 8) is 8.3% slower than the fastest rival, so ladder does not pay."),
    ],
)
def test_the_kind_that_learned_worst_never_stands_alone(
    step_s: float, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = answer(monkeypatch, found(ladder={"step_s": step_s}))
    assert f"{LEARNED_WORST} Without it: ladder" in said
    assert words in said


def test_ladder_first(monkeypatch: pytest.MonkeyPatch) -> None:
    said = answer(monkeypatch, found(ladder={"step_s": 0.9}))
    assert "parallel-ladder (TP 8) is 10.0% faster than the fastest rival." in said
    assert "The lead of ladder over the fastest rival is 22.2%" in said
    assert "learned worst" not in said


def test_a_lead_within_the_models_error_is_not_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    said = answer(monkeypatch, found(parallel_ladder={"step_s": 1.06}, ladder={"step_s": 1.08}))
    assert said.startswith("By this model a ladder kind is a little faster here, by less than the")
    assert "Measure before you change the model." in said


def test_what_a_small_mistake_turns_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said = answer(monkeypatch, found(), found(standard={"step_s": 1.005}))
    assert "pays here, but a small error of the model would change that: see below." in said
    assert "The answer changes with 2 times the bandwidth" in said
    said = answer(monkeypatch, found(standard={"step_s": 1.0}), found())
    assert said.startswith(
        "By this model a ladder kind does not pay here: standard (TP 8) is within 1%"
    )
    assert "But a small error of the model would change that: see below." in said
    assert "The answer changes with 1/2 of the bandwidth" in said
    said = answer(monkeypatch, found(parallel_ladder={"tp": 1}), found())
    assert "its best layout has TP 1, so there is nothing to hide. But a small error" in said
    assert "The lead of parallel-ladder over" in said


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parallel_ladder": {"tp": 1}}, "its best layout has TP 1, so there is nothing to hide"),
        (
            {"standard": {"step_s": 1.0, "tp": 1}},
            "standard (TP 1) is within 1% of it, or faster, and has",
        ),
        ({"standard": {"step_s": 1.0}}, "standard (TP 8) is within 1% of it, or faster."),
        (
            {"standard, halves": {"step_s": 1.009}},
            "standard in halves (TP 8) is within 1% of it, or faster, and is the standard model",
        ),
        ({"parallel": {"step_s": 0.9}}, "parallel (TP 8) is within 1% of it, or faster."),
    ],
)
def test_when_not_to_use_it(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = answer(monkeypatch, found(**changes))
    assert said.startswith("Do not use a ladder kind here: ")
    assert reason in said
    assert ("The lead of" in said) == ("TP 1, so" not in reason)


def test_the_way_that_changes_least() -> None:
    times = {"standard": 1.02, "standard, halves": 1.005, "ladder": 1.0}
    assert enough(times) == "standard, halves"
    assert enough(times | {"standard": 1.01}) == "standard"
    assert enough(times | {"standard, halves": 1.011}) == "ladder"


def test_plans_where_it_pays_and_where_it_does_not() -> None:
    """70B over TP 8 without peer-to-peer access waits half of a step; over no link at all nothing."""
    config = PRESETS["llama-3-70b"]()
    config = replace(config, precision="bf16")
    fits = fitting(config, 64, HARDWARE.device)
    slow, none = (ranked(fits, 64, replace(HARDWARE, link=link)) for link in ("p2p-off", "zero"))
    assert outcome(slow) == "pays" and lead(slow) > 0.1
    assert outcome(none) == "does not pay" and lead(none) < 0.01
    # A slower link and slower kernels make standard wait, and halves dear.
    base = replace(HARDWARE, link="nvswitch")
    leads = {name: lead(ranked(fits, 64, other)) for name, other in variants(base).items()}
    assert leads["with half of it"] > leads["with twice the link's bandwidth"]
    assert leads["if halves cost nothing (kernels without a fixed time)"] < lead(
        ranked(fits, 64, base)
    )
