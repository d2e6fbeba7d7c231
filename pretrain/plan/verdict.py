"""Does a ladder model pay on a cluster? Sentences for a plan, and what they depend on. Modelled.

A ladder kind pays where it is faster than all that needs none: standard layers, standard layers in halves
of the micro-batch (the same model), parallel layers with and without halves. Each has its own best layout,
with any tensor-parallel size.
"""

from dataclasses import replace

from megatron_ladder.config import STALE
from pretrain.config.train import TrainConfig
from pretrain.plan.planner import Hardware, Row
from pretrain.plan.search import ranked

WORTH = 0.01
"""A lead of less than this is not worth another model. The planner is not more exact than that."""
BANDWIDTHS = (2, 4, 8, 16, 32)
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


def pays(found: Found) -> bool:
    """Whether a ladder kind leads by more than WORTH, because it hides something."""
    return lead(found) > WORTH and best_ladder(found).tp > 1


def enough(seconds: dict[str, float]) -> str:
    """The first way that is within WORTH of the fastest.

    Args:
        seconds: by way, from the way that changes the model least to the one that changes it most.
    """
    fastest = min(seconds.values())
    return next(name for name, time in seconds.items() if time <= fastest * (1 + WORTH))


def variants(hardware: Hardware) -> dict[str, Hardware]:
    """What the planner assumes, changed by as much as it may be wrong."""
    gemm, link = hardware.gemm_efficiency, hardware.link_bandwidth
    return {
        "with twice the link's bandwidth": replace(hardware, link_bandwidth=2 * link),
        "with half of it": replace(hardware, link_bandwidth=link / 2),
        "with GEMMs a fifth faster": replace(hardware, gemm_efficiency=1.2 * gemm),
        "with GEMMs a fifth slower": replace(hardware, gemm_efficiency=0.8 * gemm),
        "if halves cost nothing (kernels without a fixed time)": replace(hardware, kernel_s=0.0),
    }


def verdict(
    fits: dict[str, list[TrainConfig]], found: Found, gpus: int, hardware: Hardware
) -> list[str]:
    """Whether a ladder kind pays, by how much, and what would have to be wrong: a paragraph each.

    Args:
        fits: the layouts that fit, from `fitting`.
        found: their times, from `ranked`.
    """
    ladder = best_ladder(found)
    hides = ladder.tp > 1
    others = {
        name: ranked(fits, gpus, other) for name, other in variants(hardware).items() if hides
    }
    if not pays(found):
        answer = f"Do not use a ladder kind here: {_reason(found)}."
    elif all(pays(other) for other in others.values()):
        answer = "By this model of a step a ladder kind pays here."
    else:
        answer = "By this model of a step a ladder kind pays here, unless it is a little wrong: see below."
    than = [f"{_more(rival, ladder)} than {_named(n, rival)}" for n, rival in rivals(found).items()]
    fastest = min(rivals(found).values(), key=_step_s)
    also = [
        f" {_named(name, rows[0])} is {_more(fastest, rows[0])} than the fastest of these."
        for name, rows in found.items()
        if _is_ladder(rows[0]) and rows[0] is not ladder
    ]
    paragraphs = [
        answer,
        f"{_named(ladder.residual, ladder)} is {', '.join(than)}; each at its best layout."
        + "".join(also),
    ]
    if hides:
        leads = [f"{lead(other):.1%} {name}" for name, other in others.items()]
        paragraphs.append(
            f"Its lead over the fastest of these is {lead(found):.1%}; {', '.join(leads)}. "
            f"{_turn(fits, gpus, hardware, pays(found))}"
        )
    return paragraphs


def _reason(found: Found) -> str:
    """Why no ladder kind pays."""
    ladder = best_ladder(found)
    if ladder.tp == 1:
        return "its best layout has TP 1, so there is nothing to hide"
    near = ((n, r) for n, r in rivals(found).items() if r.step_s <= ladder.step_s * (1 + WORTH))
    name, rival = next(near)
    why = f"{name} with TP {rival.tp} is within {WORTH:.0%} of it, or faster"
    if rival.tp == 1:
        return f"{why}, and has nothing to hide"
    return f"{why}, and is the standard model" if name == "standard, halves" else why


def _turn(fits: dict[str, list[TrainConfig]], gpus: int, hardware: Hardware, paying: bool) -> str:
    """The bandwidth at which the answer changes, in words."""
    for times in BANDWIDTHS:
        bandwidth = hardware.link_bandwidth * (times if paying else 1 / times)
        other = replace(hardware, link_bandwidth=bandwidth)
        if pays(ranked(fits, gpus, other)) != paying:
            part = f"{times} times" if paying else f"1/{times} of"
            return f"The answer changes with {part} the bandwidth."
    part = f"up to {times} times" if paying else f"down to 1/{times} of"
    return f"The answer is the same with {part} the bandwidth."


def _more(than: Row, row: Row) -> str:
    share = than.step_s / row.step_s - 1
    return f"{abs(share):.1%} {'faster' if share >= 0 else 'slower'}"


def _named(name: str, row: Row) -> str:
    return f"{name.replace(', halves', ' in halves')} (TP {row.tp})"


def _step_s(row: Row) -> float:
    return row.step_s


def _is_ladder(row: Row) -> bool:
    return row.residual in STALE
