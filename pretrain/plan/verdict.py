"""Does a ladder model pay on a cluster? Sentences for a plan, and what they depend on. Modelled.

A ladder kind pays where it is faster than all that needs none: standard layers, standard layers in halves
of the micro-batch (the same model), parallel layers with and without halves. Each has its own best layout,
with any tensor-parallel size.
"""

from dataclasses import replace
from typing import Literal

from megatron_ladder.config import STALE
from pretrain.config.train import TrainConfig
from pretrain.plan.experts import has_experts
from pretrain.plan.planner import Hardware
from pretrain.plan.search import Row, ranked

WORTH = 0.01
"""A lead of less than this is not worth another model, if the planner were exact."""
ERROR = 0.05
"""By so much the planner's ratios were off on one H100, and by 0.08 with sequence parallelism
(docs/design/planner.md). A lead of less than this may be none."""
LEARNED_WORST = (
    "parallel-ladder learned worst of four kinds in the one training on a GPU "
    "(docs/results/learning.md)."
)
UNTESTED = (
    "With experts nothing of the model was compared with a GPU: all-to-alls, GEMMs of small groups and "
    "kernels of the router are assumed. Measure before you rely on it."
)
BANDWIDTHS = (2, 4, 8, 16, 32)
Outcome = Literal["pays", "may pay", "does not pay"]
Found = dict[str, list[Row]]
"""Layouts by `search.way`, from the way that changes the model least to the one that changes it most."""


def best_ladder(found: Found) -> Row:
    """The fastest layout of ladder or parallel-ladder."""
    return min((rows[0] for rows in found.values() if _is_ladder(rows[0])), key=_step_s)


def rivals(found: Found) -> dict[str, Row]:
    """The fastest layout of each way without a ladder kind."""
    return {name: rows[0] for name, rows in found.items() if not _is_ladder(rows[0])}


def lead(found: Found) -> float:
    """The speed of the best ladder layout over that of its fastest rival, less one."""
    return min(rivals(found).values(), key=_step_s).step_s / best_ladder(found).step_s - 1


def outcome(found: Found) -> Outcome:
    """Whether a ladder kind leads, because it hides something, and by more than the model's error."""
    if not best_ladder(found).hides or lead(found) <= WORTH:
        return "does not pay"
    return "pays" if lead(found) > ERROR else "may pay"


def enough(seconds: dict[str, float]) -> str:
    """The first way that is within WORTH of the fastest.

    Args:
        seconds: by way, from the way that changes the model least to the one that changes it most.
    """
    fastest = min(seconds.values())
    return next(name for name, time in seconds.items() if time <= fastest * (1 + WORTH))


def variants(hardware: Hardware, *, experts: bool = False) -> dict[str, Hardware]:
    """What the planner assumes, changed by as much as it may be wrong.

    Args:
        experts: of a model with experts.
    """
    gemm, link = hardware.gemm_efficiency, hardware.link_bandwidth
    found = {
        "with twice the link's bandwidth": replace(hardware, link_bandwidth=2 * link),
        "with half of it": replace(hardware, link_bandwidth=link / 2),
        "with GEMMs a fifth faster": replace(hardware, gemm_efficiency=1.2 * gemm),
        "with GEMMs a fifth slower": replace(hardware, gemm_efficiency=0.8 * gemm),
    }
    if experts:
        kernels = "with kernels without a fixed time"
        found["with experts that get as many tokens each"] = replace(hardware, expert_imbalance=1.0)
    else:
        kernels = "if halves cost nothing (kernels without a fixed time)"
    return found | {kernels: replace(hardware, kernel_s=0.0)}


def verdict(
    fits: dict[str, list[TrainConfig]], found: Found, gpus: int, hardware: Hardware
) -> list[str]:
    """Whether a ladder kind pays, by how much, and what would have to be wrong: a paragraph each.

    Args:
        fits: the layouts that fit, from `fitting`.
        found: their times, from `ranked`.
    """
    ladder = best_ladder(found)
    experts = any(has_experts(c.model) for configs in fits.values() for c in configs[:1])
    changed = variants(hardware, experts=experts)
    others = {n: ranked(fits, gpus, other) for n, other in changed.items()}
    than = [_compared(ladder, rival, named(name, rival)) for name, rival in rivals(found).items()]
    paragraphs = [
        _answer(found, others),
        f"{named(ladder.residual, ladder)} is {', '.join(than)}; each at its best layout.",
        _other_ladder(found),
    ]
    paragraphs += [UNTESTED] if experts else []
    if ladder.hides or _turned(found, others):
        leads = [f"{_share(lead(other))} {name}" for name, other in others.items()]
        paragraphs.append(
            f"The lead of {ladder.residual} over the fastest rival is {_share(lead(found))}; "
            f"{', '.join(leads)}. {_turn(fits, gpus, hardware, outcome(found))}"
        )
    return paragraphs


def named(name: str, row: Row) -> str:
    """A way by its `search.way`, and its TP and EP sizes."""
    ep = f", EP {row.ep}" if row.ep > 1 else ""
    return f"{name.replace(', halves', ' in halves')} (TP {row.tp}{ep})"


def _answer(found: Found, others: dict[str, Found]) -> str:
    """The first paragraph. `others` are the times with each of `variants`."""
    said = outcome(found)
    turns = _turned(found, others)
    but = "but a small error of the model would change that: see below."
    if said == "may pay":
        return (
            "By this model a ladder kind is a little faster here, by less than the model's error (5 to 8 % "
            "on one H100). Measure before you change the model."
        )
    if said == "pays":
        pays = "By this model of a step a ladder kind pays here"
        return f"{pays}, {but}" if turns else f"{pays}."
    if turns:
        return (
            f"By this model a ladder kind does not pay here: {_reason(found)}. {but.capitalize()}"
        )
    return f"Do not use a ladder kind here: {_reason(found)}."


def _turned(found: Found, others: dict[str, Found]) -> bool:
    return any(outcome(other) != outcome(found) for other in others.values())


def _other_ladder(found: Found) -> str:
    """What is said of the ladder kind that is not the fastest."""
    fastest = min(rivals(found).values(), key=_step_s)
    ladders = [row for rows in found.values() if _is_ladder(row := rows[0])]
    (other,) = (row for row in ladders if row is not best_ladder(found))
    than = f"{named(other.residual, other)} is {_compared(other, fastest, 'the fastest rival')}"
    if other.residual == "parallel-ladder":
        return f"{than}."
    so = {
        "pays": "ladder pays",
        "may pay": "ladder leads by less than the model's error",
        "does not pay": "ladder does not pay",
    }
    without = {name: rows for name, rows in found.items() if name != "parallel-ladder"}
    return f"{LEARNED_WORST} Without it: {than}, so {so[outcome(without)]}."


def _reason(found: Found) -> str:
    """Why no ladder kind pays."""
    ladder = best_ladder(found)
    if not ladder.hides:
        return "its best layout has TP 1, so there is nothing to hide"
    near = ((n, r) for n, r in rivals(found).items() if r.step_s <= ladder.step_s * (1 + WORTH))
    name, rival = next(near)
    why = f"{named(name, rival)} is within {WORTH:.0%} of it, or faster"
    if not rival.hides:
        return f"{why}, and has nothing to hide"
    return f"{why}, and is the standard model" if name == "standard, halves" else why


def _turn(fits: dict[str, list[TrainConfig]], gpus: int, hardware: Hardware, said: Outcome) -> str:
    """The bandwidth at which the answer changes, in words."""
    faster = said != "does not pay"
    for times in BANDWIDTHS:
        bandwidth = hardware.link_bandwidth * (times if faster else 1 / times)
        other = replace(hardware, link_bandwidth=bandwidth)
        if outcome(ranked(fits, gpus, other)) != said:
            part = f"{times} times" if faster else f"1/{times} of"
            return f"The answer changes with {part} the bandwidth."
    if faster:
        return f"A faster link does not change the answer, up to {times} times the bandwidth."
    return f"A slower link does not change the answer, down to 1/{times} of the bandwidth."


def _compared(row: Row, other: Row, name: str) -> str:
    share = other.step_s / row.step_s - 1
    if _share(share) == "none":
        return f"as fast as {name}"
    return f"{_share(abs(share))} {'faster' if share > 0 else 'slower'} than {name}"


def _share(value: float) -> str:
    return "none" if abs(value) < 0.0005 else f"{value:.1%}"


def _step_s(row: Row) -> float:
    return row.step_s


def _is_ladder(row: Row) -> bool:
    return row.residual in STALE
