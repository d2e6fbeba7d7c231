"""The share of a link's time that is hidden, from measured times, and the largest share that can be."""

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_ladder.config import ModelConfig
from pretrain.bench.interleaved import quotients
from pretrain.bench.kinds_plan import BLOCKING, NO_COMM, Kind
from pretrain.config.presets import PRESETS
from pretrain.plan.links import NVLINK
from pretrain.plan.links import PRESETS as LINKS
from pretrain.plan.planner import DEVICES, Hardware, Submodule, pass_seconds, submodules

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


def half_width(of: Callable[[list[int]], float], count: int) -> float:
    """Half the width of a figure's 90 % interval: `count` repetitions are drawn anew, with replacement
    (bootstrap), and `of` gives the figure of each draw, from the numbers of its repetitions."""
    dice = random.Random(1)  # noqa: S311 (no secrets)
    draws = (of(dice.choices(range(count), k=count)) for _ in range(400))
    cuts = statistics.quantiles(draws, n=20)
    return (cuts[-1] - cuts[0]) / 2


def uncertainty(times: Times, name: str, part: str) -> float:
    """Half the width of the hidden share's 90 % interval."""
    keys = [(n, way) for n in (name, BLOCKING) for way in ("link", "zero")]

    def share(chosen: list[int]) -> float:
        drawn = {key: [times[key][i] for i in chosen] for key in keys}
        return hidden_share(drawn, name, part)

    return half_width(share, len(times[name, "link"]))


def over_standard(times: Times, name: str, link: str) -> list[float]:
    """Quartiles of a line's totals over those of megatron-core's standard, repetition by repetition."""
    mine, standards = (times[_key(times, n, link)] for n in (name, "standard"))
    return quotients(map(sum, mine), map(sum, standards))


def link_in_words(report: dict[str, Any]) -> str:
    """How long the modelled link takes, in a run's JSON."""
    return (
        f"an all-reduce is {1e3 * report['link_s']:.3g} ms on the link, "
        f"{report['link_ratio']:.3g} x a sub-module's forward, "
        f"on top of its own {1e3 * report['own_s']:.2g} ms"
    )


def in_words(quartiles: list[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.3f} (quartiles {low:.3f} to {high:.3f})"


def _key(times: Times, name: str, link: str) -> tuple[str, str]:
    """no-comm is measured once: it uses no link."""
    return (name, link) if (name, link) in times else (name, "link")


def all_link_time(layers: int, sequence_parallel: bool, link_s: float) -> tuple[float, float]:
    """Seconds of forward's and backward's collectives when each is waited for at once.

    Two all-reduces a layer and pass. With sequence parallelism a reduce-scatter and an all-gather of half
    the time instead, and in backward one more all-gather, of the input.
    """
    forward_s = 2 * layers * link_s
    return forward_s, (1.5 if sequence_parallel else 1.0) * forward_s


def most_by_layers(kind: Kind, layers: int, sequence_parallel: bool) -> Shares:
    """The shares of the link's time that a kind can hide by its number of layers, if every sub-module takes
    far longer than the link. Only messages with no computation beside them are not hidden.

    That is forward's last output (with sequence parallelism half of it, and half of the first input), and
    in backward, with sequence parallelism, the first all-gather. Backward's last reduction runs behind the
    gradient of a weight. In halves a message has half the size.
    """
    assert kind.hides
    message = 0.5 if kind.halves else 1.0
    ends = message, (message / 2 if sequence_parallel else 0.0)
    return shares(ends, all_link_time(layers, sequence_parallel, 1.0))


def most_by_planner(
    kind: Kind,
    layers: int,
    sequence_parallel: bool,
    parts: tuple[Submodule, Submodule],
    link_s: float,
) -> Shares:
    """The shares that a kind can hide, by the planner's model of a pass.

    Args:
        parts: attention and MLP.
    """
    options = {"sequence_parallel": sequence_parallel}
    exposed = planned(kind, layers, parts, 0.0, link_s, options)
    return shares(exposed, all_link_time(layers, sequence_parallel, link_s))


def shares(exposed: tuple[float, float], whole: tuple[float, float]) -> Shares:
    """Of forward's and backward's link time the part that is not exposed."""
    return {
        "forward": 1 - exposed[0] / whole[0],
        "backward": 1 - exposed[1] / whole[1],
        "total": 1 - sum(exposed) / sum(whole),
    }


def target_ratio(target: str, link: str) -> float:
    """An all-reduce over a sub-module's forward, for a preset's layers at TP=8 on H100s, by the
    planner's model of their compute."""
    config = PRESETS[target]()
    tokens = config.micro_batch_size * config.data.seq_length
    hardware = Hardware(DEVICES["h100"], NVLINK)
    attention, mlp = submodules(
        config.model, hardware, tokens=tokens, seq_length=config.data.seq_length, tp=8, sp=False
    )
    message = 2 * tokens * config.model.hidden_size  # bf16
    seconds = LINKS[link].all_reduce_seconds(message)
    return seconds / ((attention.forward_s + mlp.forward_s) / 2)


def weight_gradient_shares(
    model: ModelConfig, *, tokens: int, seq_length: int, tp: int, fp8: bool, on_gpu: bool
) -> tuple[float, float]:
    """The shares of attention's and MLP's backward that their first linear's weight gradient takes, by the
    planner's times of the parts of a sub-module.

    Args:
        tokens: of the micro-batch.
        on_gpu: with an H100's times. Else by numbers of operations alone: a CPU has few for each byte.
    """
    hardware = Hardware(DEVICES["h100"], NVLINK, fp8=fp8)
    if not on_gpu:
        hardware = replace(
            hardware,
            device=replace(hardware.device, hbm_bytes_per_s=math.inf),
            attention_efficiency=hardware.gemm_efficiency,
            kernel_s=0.0,
        )
    attention, mlp = submodules(
        model, hardware, tokens=tokens, seq_length=seq_length, tp=tp, sp=False
    )
    return (
        attention.weight_gradient_s / attention.backward_s,
        mlp.weight_gradient_s / mlp.backward_s,
    )


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
    kind: Kind,
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
    residuals = ModelConfig(layers, 8, 8, 1, **kind.model_fields(layers)).layer_residuals()
    if kind.halves:
        options = {**options, "halves": True}
        parts, own_s, link_s = (_half(parts[0]), _half(parts[1])), own_s / 2, link_s / 2
    with_link, without = (
        pass_seconds(residuals, *parts, seconds, **options) for seconds in (own_s + link_s, own_s)
    )
    return with_link[0] - without[0], with_link[1] - without[1]


def _half(part: Submodule) -> Submodule:
    return Submodule(part.forward_s / 2, part.backward_s / 2, part.weight_gradient_s / 2)


def table(times: Times, bounds: dict[str, dict[str, Shares]]) -> str:
    """Medians, quotients, and the hidden shares against two standards.

    Args:
        bounds: of each kind the largest shares that it can hide, by how they were found.
    """
    names = list(dict.fromkeys(name for name, _ in times))
    ways = [(p, w) for p in PASSES for w in ("link", "zero")]
    out = [f"{'median ms':46}" + "".join(f"{p + ' ' + w:>16}" for p, w in ways)]

    def row(name: str, cells: list[float], form: str) -> None:
        out.append(f"{name:46}" + "".join(f"{c:16{form}}" for c in cells))

    for name in names:
        row(name, [1e3 * median(times, _key(times, name, w), p) for p, w in ways], ".1f")
    out += ["", f"{'total over standard (quartiles)':46}{'no link':>34}{'link':>34}"]
    for name in names:
        cells = (in_words(over_standard(times, name, w)) for w in ("zero", "link"))
        out.append(f"{name:46}" + "".join(f"{cell:>34}" for cell in cells))
    for standard, title in ((BLOCKING, "waiting at once"), ("standard", "megatron-core's")):
        title = f"hidden, against {title}"
        out += ["", f"{title:46}" + "".join(f"{p:>16}" for p in PASSES)]
        for name in names:
            if name not in (standard, BLOCKING, NO_COMM):
                row(name, [hidden_share(times, name, p, standard) for p in PASSES], ".3f")
        if standard == BLOCKING:
            for name, found in bounds.items():
                for by, shares in found.items():
                    row(f"{name} at most, by {by}", [shares[p] for p in PASSES], ".3f")
    if NO_COMM in names:
        out += ["", f"{'(T_std - T) / (T_std - T_no-comm)':46}"]
        for name in names:
            if name not in (BLOCKING, "standard", NO_COMM):
                row(name, [_against_no_comm(times, name, p) for p in PASSES], ".3f")
    return "\n".join(out)


def _against_no_comm(times: Times, name: str, part: str) -> float:
    standard, mine, bound = (median(times, (n, "link"), part) for n in ("standard", name, NO_COMM))
    return (standard - mine) / (standard - bound)
