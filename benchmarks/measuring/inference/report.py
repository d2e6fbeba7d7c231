"""What the inference benchmark makes of its times: shares, speed-ups, whole generations, tables."""

import random
import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
    """What the link adds to each kind, over no-comm's compute; and the shares and speed-ups of it.

    Args:
        times: seconds of a pass, of the same repetitions for every line: what the link adds is the
            median of its differences from the pass without in the same repetition. What an alternative
            computes besides counts as what the link adds to it.
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
    """Standard error of the hidden share: its spread when the repetitions are drawn again (bootstrap)."""
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
    """Prefill and decode together: tokens/s of each kind, by the model, and from the model's compute and
    the measured relative times."""
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
    """Tokens/s of each kind. Args: phases: its seconds in a pass of prefill and in one of decode."""
    seconds = {k: generation_seconds(SHAPES[shape], batch, *(p[k] for p in phases)) for k in KINDS}
    return {kind: batch * NEW_TOKENS / s for kind, s in seconds.items()}


def tables(report: dict[str, Any]) -> str:
    """Those of docs/guides/serve.md."""
    rows = [
        "| | batch | attention, MLP, all-reduce, us | speed-up: parallel | ladder | no-comm (the bound) | "
        "hidden: parallel | ladder | by the model: parallel | ladder | everything counted: parallel | "
        "ladder |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in report["cases"]:
        modelled, share = r["modelled"], r["hidden_share"]
        parts = [f"{1e6 * modelled[k]:.0f}" for k in ("attention_s", "mlp_s", "all_reduce_s")]
        cells = [", ".join(parts), *(f"{r['speed_up'][k]:.2f}" for k in KINDS[1:])]
        error = r["hidden_share_error"]
        cells += [f"{share[k]:.2f} +- {error[k]:.2f}" for k in share]
        cells += [f"{modelled['hidden_share'][k]:.2f}" for k in share]
        cells += [f"{r['raw_speed_up'][k]:.2f}" for k in share]
        name = f"{r['phase']}, {r['shape']}, {r['link']}"
        rows.append(f"| {name} | {r['batch']} | {' | '.join(cells)} |")
    rows += [
        "",
        "| tokens/s | batch | standard | parallel | ladder | no-comm | speed-up: parallel | ladder | "
        "no-comm | the paper's: parallel | ladder | no-comm | hidden | the paper's |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for line in report["whole"]:
        rates, paper = line["tokens_per_s"], line["paper"]
        cells = [f"{rates[k]:.0f}" for k in KINDS]
        cells += [f"{rates[k] / rates['standard']:.2f}" for k in KINDS[1:]]
        cells += [f"{paper[k] / paper['standard']:.2f}" if k in paper else "" for k in KINDS[1:]]
        cells += [
            f"{hidden_of_rates(r):.2f}" if "no-comm" in r else ""  # published for one link
            for r in (rates, paper)
        ]
        rows.append(f"| {line['shape']}, {line['link']} | {line['batch']} | {' | '.join(cells)} |")
    rows += _measured_alternatives(report["cases"])
    rows += ["", f"| modelled speed-up | batch | parallel | ladder | {' | '.join(OTHERS)} |"]
    rows.append("|---|---:|---:|---:|" + "---:|" * len(OTHERS))
    for r in report["cases"]:
        standard = r["modelled"]["pass_s"]["standard"]
        others = alternatives(SHAPES[r["shape"]], r["phase"], batch=r["batch"], link=r["link"])
        cells = [f"{r['modelled']['speed_up'][k]:.2f}" for k in ("parallel", "ladder")]
        cells += [f"{standard / others[k]:.2f}" if k in others else "" for k in OTHERS]
        name = f"{r['phase']}, {r['shape']}, {r['link']}"
        rows.append(f"| {name} | {r['batch']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _measured_alternatives(cases: list[dict[str, Any]]) -> list[str]:
    names = [name for name in BUILT if any(name in r["speed_up"] for r in cases)]
    if not names:
        return []
    rows = ["", f"| measured speed-up | batch | parallel | ladder | {' | '.join(names)} |"]
    rows.append("|---|---:|---:|---:|" + "---:|" * len(names))
    for r in cases:
        found = [r["speed_up"].get(name) for name in ("parallel", "ladder", *names)]
        cells = ["" if speed_up is None else f"{speed_up:.2f}" for speed_up in found]
        name = f"{r['phase']}, {r['shape']}, {r['link']}"
        rows.append(f"| {name} | {r['batch']} | {' | '.join(cells)} |")
    return rows


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
            panel.grid(True, color="#e6e6e6")
            panel.spines[["top", "right"]].set_visible(False)
        axes[-1, column].set_xlabel("batch")
    for row in range(len(phases)):
        axes[row, 0].set_ylabel("speed-up over standard")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(path, dpi=110)
