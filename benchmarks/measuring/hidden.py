"""The share of a link's time that is hidden, from measured times, and the largest share that can be."""

import statistics
from collections.abc import Callable
from typing import Any

from pretrain.bench.interleaved import quotients
from pretrain.bench.kinds_plan import BLOCKING as BLOCKING
from pretrain.bench.kinds_plan import NO_COMM as NO_COMM
from pretrain.plan.planner import Submodule, pass_seconds

Times = dict[tuple[str, str], list[tuple[float, ...]]]
"""By line and link: seconds of forward and of backward, of each repetition."""

PASSES: dict[str, Callable[[tuple[float, ...]], float]] = {
    "forward": lambda t: t[0],
    "backward": lambda t: t[1],
    "total": sum,
}
Shares = dict[str, float]
"""By pass."""


def median(times: Times, key: tuple[str, str], part: str) -> float:
    return statistics.median(PASSES[part](t) for t in times[key])


def link_time(times: Times, name: str, part: str) -> float:
    """Seconds that the link adds: T(link) - T(zero)."""
    return median(times, (name, "link"), part) - median(times, (name, "zero"), part)


def hidden_share(times: Times, name: str, part: str, standard: str = BLOCKING) -> float:
    return 1 - link_time(times, name, part) / link_time(times, standard, part)


def paired(a: list[tuple[float, ...]], b: list[tuple[float, ...]]) -> str:
    """The quotient of two lines' totals, repetition by repetition."""
    low, middle, high = quotients(map(sum, a), map(sum, b))
    return f"{middle:.3f} (quartiles {low:.3f} to {high:.3f})"


def all_link_time(layers: int, sequence_parallel: bool, link_s: float) -> tuple[float, float]:
    """Seconds of forward's and backward's collectives when each is waited for at once.

    Two all-reduces a layer and pass. With sequence parallelism a reduce-scatter and an all-gather of half
    the time instead, and in backward one more all-gather, of the input.
    """
    forward_s = 2 * layers * link_s
    return forward_s, (1.5 if sequence_parallel else 1.0) * forward_s


def most_hidden(
    layers: int,
    sequence_parallel: bool,
    parts: tuple[Submodule, Submodule] | None = None,
    link_s: float = 1.0,
) -> Shares:
    """The shares of the link's time that ladder layers can hide, by the planner's model of a pass.

    Args:
        parts: attention and MLP. None: both take far longer than the link, so that only the collectives
            with no computation beside them are not hidden: forward's last output (with sequence
            parallelism half of it, and half of the first input), and in backward, with sequence
            parallelism, the first all-gather.
    """
    long = Submodule(100 * link_s, 200 * link_s, 50 * link_s)
    attention, mlp = parts or (long, long)
    with_link, without = (
        pass_seconds(
            ["ladder"] * layers, attention, mlp, seconds, sequence_parallel=sequence_parallel
        )
        for seconds in (link_s, 0.0)
    )
    exposed = [a - b for a, b in zip(with_link, without, strict=True)]
    whole = all_link_time(layers, sequence_parallel, link_s)
    return {
        "forward": 1 - exposed[0] / whole[0],
        "backward": 1 - exposed[1] / whole[1],
        "total": 1 - sum(exposed) / sum(whole),
    }


def scaled(
    parts: tuple[Submodule, Submodule], layers: int, forward_s: float, backward_s: float
) -> tuple[Submodule, Submodule]:
    """`parts` scaled so that all layers together take as long as the passes measured. While the recorder
    waits for each sub-module on a GPU, kernels are not queued ahead, and sub-modules take longer."""
    forward = forward_s / (layers * sum(p.forward_s for p in parts))
    backward = backward_s / (layers * sum(p.backward_s for p in parts))
    attention, mlp = (
        Submodule(p.forward_s * forward, p.backward_s * backward, p.weight_gradient_s * backward)
        for p in parts
    )
    return attention, mlp


def planned(
    name: str,
    layers: int,
    parts: tuple[Submodule, Submodule],
    own_s: float,
    link_s: float,
    options: dict[str, Any],
) -> tuple[float, float]:
    """Seconds that the link adds to forward and backward, by the planner's model.

    Args:
        own_s: seconds of a collective by itself; the link's time comes on top.
        options: those of `pass_seconds`.
    """
    kinds = [name] * layers
    if name == "hybrid (last half)":
        kinds = ["standard"] * (layers - layers // 2) + ["ladder"] * (layers // 2)
    with_link, without = (
        pass_seconds(kinds, *parts, seconds, **options) for seconds in (own_s + link_s, own_s)
    )
    return with_link[0] - without[0], with_link[1] - without[1]


def table(times: Times, bounds: dict[str, Shares]) -> str:
    """Medians, and the hidden shares against two standards.

    Args:
        bounds: the largest shares that ladder can hide, by how they were found.
    """
    names = list(dict.fromkeys(name for name, _ in times))
    ways = [(p, w) for p in PASSES for w in ("link", "zero")]
    out = [f"{'median ms':34}" + "".join(f"{p + ' ' + w:>16}" for p, w in ways)]

    def row(name: str, cells: list[float], form: str) -> None:
        out.append(f"{name:34}" + "".join(f"{c:16{form}}" for c in cells))

    for name in names:
        # no-comm has no link
        keys = [(name, w) if (name, w) in times else (name, "link") for _, w in ways]
        found = zip(keys, ways, strict=True)
        row(name, [1e3 * median(times, key, p) for key, (p, _) in found], ".1f")
    for standard, title in ((BLOCKING, "waiting at once"), ("standard", "megatron-core's")):
        title = f"hidden, against {title}"
        out += ["", f"{title:34}" + "".join(f"{p:>16}" for p in PASSES)]
        for name in names:
            if name not in (standard, BLOCKING, NO_COMM):
                row(name, [hidden_share(times, name, p, standard) for p in PASSES], ".3f")
        if standard == BLOCKING:
            for by, shares in bounds.items():
                row(f"ladder at most, by {by}", [shares[p] for p in PASSES], ".3f")
    if NO_COMM in names:
        out += ["", f"{'(T_std - T) / (T_std - T_no-comm)':34}"]
        for name in names:
            if name not in (BLOCKING, "standard", NO_COMM):
                row(name, [_against_no_comm(times, name, p) for p in PASSES], ".3f")
    return "\n".join(out)


def _against_no_comm(times: Times, name: str, part: str) -> float:
    standard, mine, bound = (median(times, (n, "link"), part) for n in ("standard", name, NO_COMM))
    return (standard - mine) / (standard - bound)
