"""Shares, speed-ups, whole generations, tables and a picture from the inference benchmark's times."""

import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from measuring import pictures
from measuring.facts import table
from measuring.inference.plan import (
    BUILT,
    KINDS,
    NEW_TOKENS,
    PHASES,
    SHAPES,
    Pass,
    alternatives,
    generation_seconds,
)

# arXiv 2501.06589, tokens/s of 70B at TP 8 on H100s: standard, parallel, ladder, no-comm.
PAPER: dict[tuple[str, str], dict[int, tuple[float | None, ...]]] = {
    ("70b", "nvswitch"): {
        1: (77.39, 94.22, 101.22, 110.59),
        4: (258.56, 307.34, 331.45, 355.80),
        16: (843.15, 973.74, 1003.52, 1109.65),
        64: (1940.99, 2259.38, 2242.1, 2474.49),
    },
    ("70b", "p2p-off"): {
        1: (51.66, 72.36, 82.59, None),
        4: (173.62, 241.08, 271.82, None),
        16: (546.68, 744.33, 738.56, None),
        64: (1454.42, 1873.71, 1864.05, None),
    },
}
OTHERS = (*BUILT, "standard, half-batches", "parallel, one layer stale")
COLOURS = {"parallel": "#E69F00", "ladder": "#0072B2", "no-comm": "#999999"}


Line = tuple[str, str]
"""A kind; "link", or "zero" for none."""


def figures(times: dict[Line, list[float]]) -> dict[str, Any]:
    """The time that the link adds to each kind, over no-comm's compute; shares and speed-ups from it.

    Args:
        times: seconds of a pass, of the same repetitions for every line. The added time is the median of
            the differences, in each repetition, between the pass with the link and the pass without it.
            An alternative's extra compute counts as added by the link.
    """
    computed = statistics.median(times["no-comm", "zero"])
    adds = {"no-comm": 0.0}
    differences = {}
    for kind in (k for k in (*KINDS[:-1], *BUILT) if (k, "link") in times):
        pairs = zip(times[kind, "link"], times[kind.partition(",")[0], "zero"], strict=True)
        differences[kind] = [link - zero for link, zero in pairs]
        adds[kind] = statistics.median(differences[kind])
    hiding = ("parallel", "ladder")
    return {
        "relative_time": {k: 1 + adds[k] / computed for k in KINDS},
        "speed_up": {k: (computed + adds["standard"]) / (computed + adds[k]) for k in adds},
        "hidden_share": {k: 1 - adds[k] / adds["standard"] for k in hiding},
        "hidden_share_error": {k: _share_error(differences, k) for k in hiding},
        "raw_speed_up": {
            k: statistics.median(times["standard", "link"]) / statistics.median(times[k, "link"])
            for k in ("parallel", "ladder")
        },
    }


def _share_error(differences: dict[str, list[float]], kind: str) -> float:
    """Standard error of the hidden share: its spread over repetitions that are drawn again (bootstrap)."""
    draw = random.Random(0)  # noqa: S311
    count = len(differences[kind])
    shares = []
    for _ in range(200):
        drawn = draw.choices(range(count), k=count)
        medians = [
            statistics.median([differences[k][i] for i in drawn]) for k in (kind, "standard")
        ]
        shares.append(1 - medians[0] / medians[1])
    return statistics.stdev(shares)


def modelled_figures(modelled: Pass) -> dict[str, dict[str, float]]:
    standard = modelled.seconds("standard")
    return {
        "pass_s": {kind: modelled.seconds(kind) for kind in KINDS},
        "speed_up": {kind: standard / modelled.seconds(kind) for kind in KINDS},
        "hidden_share": {kind: modelled.hidden_share(kind) for kind in ("parallel", "ladder")},
    }


def whole(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens/s of each kind, prefill and decode together: by the model alone, and by modelled compute with
    measured relative times."""
    cells = {(r["shape"], r["link"], r["batch"], r["phase"]): r for r in results}
    lines = []
    for shape, link, batch in dict.fromkeys(key[:3] for key in cells):
        phases = [cells[key] for p in PHASES if (key := (shape, link, batch, p)) in cells]
        if len(phases) < len(PHASES):
            continue
        modelled = [p["modelled"]["pass_s"] for p in phases]
        measured = [
            {kind: p["modelled"]["pass_s"]["no-comm"] * p["relative_time"][kind] for kind in KINDS}
            for p in phases
        ]
        published = PAPER.get((shape, link), {}).get(batch, ())
        lines.append(
            {
                "shape": shape,
                "link": link,
                "batch": batch,
                "tokens_per_s": _rates(shape, batch, measured),
                "modelled": _rates(shape, batch, modelled),
                "paper": {k: r for k, r in zip(KINDS, published, strict=False) if r},
            }
        )
    return lines


def _rates(shape: str, batch: int, phases: list[dict[str, float]]) -> dict[str, float]:
    """Tokens/s of each kind. Args: phases: seconds of a pass, of prefill and of decode."""
    seconds = {k: generation_seconds(SHAPES[shape], batch, *(p[k] for p in phases)) for k in KINDS}
    return {kind: batch * NEW_TOKENS / s for kind, s in seconds.items()}


CASE = {"": "{phase}, {shape}, {link}", "batch": "{batch}"}


def tables(report: dict[str, Any]) -> str:
    """Measured shares and speed-ups, whole generations, measured alternatives, modelled speed-ups."""
    found = [_measured(report["cases"]), _generations(report["whole"])]
    if built := [k for k in BUILT if any(k in case["speed_up"] for case in report["cases"])]:
        title = {"measured speed-up": CASE[""], "batch": CASE["batch"]}
        kinds = ["parallel", "ladder", *built]
        found.append(table(report["cases"], title | _each(kinds, "speed_up")))
    return "\n\n".join([*found, _modelled(report["cases"])])


def _each(kinds: Sequence[str], field: str, title: str = "") -> dict[str, str]:
    """A column for each kind of a field."""
    return {f"{title}{kind}": f"{{{field}[{kind}]:.2f}}" for kind in kinds}


def _measured(cases: list[dict[str, Any]]) -> str:
    parts = ("attention_s", "mlp_s", "all_reduce_s")
    rows = [{**case, "us": [1e6 * case["modelled"][part] for part in parts]} for case in cases]
    hiding = ("parallel", "ladder")
    error = "{{hidden_share[{0}]:.2f}} +- {{hidden_share_error[{0}]:.2f}}"
    columns = {
        **CASE,
        "attention, MLP, all-reduce, us": "{us[0]:.0f}, {us[1]:.0f}, {us[2]:.0f}",
        **_each(KINDS[1:], "speed_up", "speed-up: "),
        **{f"hidden: {kind}": error.format(kind) for kind in hiding},
        **_each(hiding, "modelled[hidden_share]", "hidden, modelled: "),
        **_each(hiding, "raw_speed_up", "speed-up, everything counted: "),
    }
    return table(rows, columns)


def _generations(whole: list[dict[str, Any]]) -> str:
    rows = []
    for line in whole:
        # The paper has no-comm's rates for one link only.
        both = {"measured": line["tokens_per_s"], "paper": line["paper"]}
        speed_up = {
            name: {kind: rates[kind] / rates["standard"] for kind in rates}
            for name, rates in both.items()
        }
        hidden = {
            name: hidden_of_rates(rates) for name, rates in both.items() if "no-comm" in rates
        }
        rows.append({**line, "speed_up": speed_up, "hidden": hidden})
    columns = {
        "tokens/s": "{shape}, {link}",
        "batch": "{batch}",
        **{kind: f"{{tokens_per_s[{kind}]:.0f}}" for kind in KINDS},
        **_each(KINDS[1:], "speed_up[measured]", "speed-up: "),
        **_each(KINDS[1:], "speed_up[paper]", "the paper's: "),
        "hidden": "{hidden[measured]:.2f}",
        "hidden, the paper's": "{hidden[paper]:.2f}",
    }
    return table(rows, columns)


def _modelled(cases: list[dict[str, Any]]) -> str:
    rows = []
    for case in cases:
        shape, phase = SHAPES[case["shape"]], case["phase"]
        others = alternatives(shape, phase, batch=case["batch"], link=case["link"])
        standard = case["modelled"]["pass_s"]["standard"]
        other_ways = {name: standard / seconds for name, seconds in others.items()}
        rows.append({**case, "speed_up": case["modelled"]["speed_up"] | other_ways})
    title = {"modelled speed-up": CASE[""], "batch": CASE["batch"]}
    return table(rows, title | _each(["parallel", "ladder", *OTHERS], "speed_up"))


def hidden_of_rates(rates: dict[str, float]) -> float:
    """(T_standard - T_ladder) / (T_standard - T_no-comm), T being one over the rate."""
    standard, ladder, bound = (1 / rates[k] for k in ("standard", "ladder", "no-comm"))
    return (standard - ladder) / (standard - bound)


def draw(path: Path, results: list[dict[str, Any]]) -> None:
    """A panel for each shape, link and phase: speed-up over standard by batch."""
    names = list(dict.fromkeys((r["shape"], r["link"]) for r in results))
    phases = list(dict.fromkeys(r["phase"] for r in results))
    size = (2.9 * len(names) + 0.8, 2.6 * len(phases) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(phases), len(names), squeeze=False, sharey="col")
    for column, name in enumerate(names):
        for row, phase in enumerate(phases):
            panel = axes[row, column]
            cells = [r for r in results if (r["shape"], r["link"], r["phase"]) == (*name, phase)]
            batches = [str(r["batch"]) for r in cells]
            for kind, colour in COLOURS.items():
                speed_ups = [r["speed_up"][kind] for r in cells]
                style = ":" if kind == "no-comm" else "-"
                panel.plot(batches, speed_ups, style, marker="o", color=colour, label=kind)
            panel.set_title(f"{', '.join(name)}: {phase}", fontsize=10)
            pictures.plain(panel)
        axes[-1, column].set_xlabel("batch")
    for row in range(len(phases)):
        axes[row, 0].set_ylabel("speed-up over standard")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    pictures.save(path, figure)
