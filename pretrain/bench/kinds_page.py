"""What `bench kinds` shows of its result file: figures made of the times, a table, a picture."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pretrain.bench.kinds_plan import BLOCKING, NO_COMM, STANDARD
from pretrain.files import write_atomically
from pretrain.pictures import COLOURS, GREY, png_bytes, si

PASSES = ("forward", "backward", "total")
_LEAST_EXPOSED = 0.02
"""Of the time of layers that wait at once: where less of it is communication, a share of it is noise."""


def figures(row: dict[str, Any], num_layers: int, seq_length: int) -> dict[str, Any]:
    """`row` of a result file with what follows from its times.

    For each kind, by the medians of its repetitions:
        forward_s, backward_s
        tokens_per_s_per_gpu  of the whole model's layers: measured layers count as a part of them
        over_standard         the time of megatron-core's standard layers over its own, the median over
                              repetitions
        hidden_share          1 - (T - T_no-comm) / (T_waiting-at-once - T_no-comm), by pass. None where
                              communication is hardly anything
    For the row:
        link_over_compute     the collectives of one sub-module's output by themselves, over the forward
                              compute of a sub-module (no-comm)

    Args:
        num_layers: those of the whole model.
    """
    kinds = {name: dict(kind) for name, kind in row.get("kinds", {}).items()}
    measured = {name: kind for name, kind in kinds.items() if "error" not in kind}
    share_of_model = row["num_layers"] / num_layers
    tokens = row["micro_batch_size"] * seq_length / row["tensor_model_parallel_size"]
    medians = {name: _medians(kind["forward_backward_s"]) for name, kind in measured.items()}
    for name, kind in measured.items():
        forward_s, backward_s, total_s = medians[name]
        kind["forward_s"], kind["backward_s"] = forward_s, backward_s
        kind["tokens_per_s_per_gpu"] = tokens * share_of_model / total_s
        if STANDARD in measured:
            pairs = zip(
                measured[STANDARD]["forward_backward_s"], kind["forward_backward_s"], strict=True
            )
            kind["over_standard"] = statistics.median(sum(a) / sum(b) for a, b in pairs)
        if BLOCKING in measured and NO_COMM in measured and name not in (BLOCKING, NO_COMM):
            kind["hidden_share"] = {
                part: _hidden(own, waiting, without)
                for part, own, waiting, without in zip(
                    PASSES, medians[name], medians[BLOCKING], medians[NO_COMM], strict=True
                )
            }
    found = {**row, "kinds": kinds} if kinds else dict(row)
    if NO_COMM in measured and "all_reduce_s" in row:
        which = "reduce_scatter_all_gather_s" if row["sequence_parallel"] else "all_reduce_s"
        submodule_s = medians[NO_COMM][0] / (2 * row["num_layers"])
        found["link_over_compute"] = row[which] / submodule_s
    return found


def _medians(times: list[list[float]]) -> tuple[float, float, float]:
    forwards, backwards = zip(*times, strict=True)
    return (
        statistics.median(forwards),
        statistics.median(backwards),
        statistics.median(map(sum, times)),
    )


def _hidden(own_s: float, waiting_s: float, without_s: float) -> float | None:
    exposed_s = waiting_s - without_s
    if exposed_s < _LEAST_EXPOSED * waiting_s:
        return None
    return 1 - (own_s - without_s) / exposed_s


def line(row: dict[str, Any]) -> str:
    """A row with its figures, in a line: why it failed, or each kind over standard."""
    head = f"{row['layout']} ({row['num_layers']} layers): "
    if "error" in row:
        return head + row["error"]
    kinds, parts = row["kinds"], []
    if "over_standard" in kinds.get(STANDARD, {}):
        parts.append(f"standard {kinds[STANDARD]['tokens_per_s_per_gpu']:,.0f} tokens/s a GPU")
        others = [
            f"{name} {kind['over_standard']:.3f}"
            for name, kind in kinds.items()
            if name not in (STANDARD, BLOCKING) and "over_standard" in kind
        ]
        if others:
            parts.append(f"over it: {', '.join(others)}")
    if "link_over_compute" in row:
        parts.append(f"link over compute {row['link_over_compute']:.2f}")
    parts += [f"{name}: {kind['error']}" for name, kind in kinds.items() if "error" in kind]
    return head + "; ".join(parts)


def table(report: dict[str, Any]) -> str:
    """The best layout of each kind, in each precision, over the best layout of standard."""
    out = []
    for precision, rows in _by_precision(report).items():
        best = _best(rows)
        if STANDARD not in best:
            continue
        base = best[STANDARD][1]["tokens_per_s_per_gpu"]
        out += [
            "",
            f"{precision:20} {'tokens/s a GPU':>14} {'over standard':>14} {'hidden':>8}  best layout",
        ]
        for name, (row, kind) in best.items():
            speed = kind["tokens_per_s_per_gpu"]
            hidden = (kind.get("hidden_share") or {}).get("total")
            share = "" if hidden is None else f"{hidden:.2f}"
            out.append(f"{name:25} {speed:14,.0f} {speed / base:14.3f} {share:>8}  {row['layout']}")
    if not out:
        return "Nothing has been measured."
    return "\n".join(
        [
            *out,
            "",
            "Layers alone: without embedding, head, optimizer, and the communication of data and pipeline",
            "parallelism. no-comm computes wrong numbers: it is the bound, but not quite with SP, as it",
            "runs without SP. hidden: of the communication that standard layers would wait for in the same",
            "layout.",
        ]
    )


def draw(path: Path, report: dict[str, Any]) -> None:
    """A picture: a line for each layout, a dot for each kind. Left tokens/s a GPU, right over standard."""
    rows = [row for group in _by_precision(report).values() for row in group]
    names = list(dict.fromkeys(name for row in rows for name in row["kinds"]))
    colours = dict(zip([n for n in names if n not in (BLOCKING, NO_COMM)], COLOURS, strict=False))
    figure = Figure(figsize=(12, 2.1 + 0.32 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, field, title in (
        (left, "tokens_per_s_per_gpu", "tokens/s a GPU (layers alone)"),
        (right, "over_standard", "over standard in the same layout"),
    ):
        for name in names:
            points = [
                (row["kinds"][name][field], place)
                for place, row in enumerate(rows)
                if field in row["kinds"].get(name, {})
            ]
            if not points:
                continue
            bound = name in (BLOCKING, NO_COMM)
            marker = ("|" if name == NO_COMM else "x") if bound else "o"
            axes.scatter(
                *zip(*points, strict=True),
                label=name,
                marker=marker,
                color=GREY if bound else colours[name],
                s=40,
            )
        axes.set_xlabel(title)
        axes.grid(True, color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_xlim(left=0)
    left.xaxis.set_major_formatter(lambda value, _: si(value))
    right.axvline(1.0, color=GREY, linewidth=0.8)
    left.set_yticks(range(len(rows)), [row["layout"] for row in rows])
    left.invert_yaxis()
    figure.suptitle(
        f"{report['options']['preset']}, {report['ranks']} x {report['device']}, sequence "
        f"{report['seq_length']}: measured\n"
        "no-comm is the bound, but not quite with SP, as it runs without SP",
        fontsize=11,
    )
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    write_atomically(path, png_bytes(figure))


def _by_precision(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows that have figures."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        if any("tokens_per_s_per_gpu" in kind for kind in row.get("kinds", {}).values()):
            found.setdefault(f"FP8 {row['fp8']}" if row["fp8"] else row["precision"], []).append(
                row
            )
    return found


def _best(rows: list[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By kind: the row in which it is fastest, and its figures there."""
    best: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for row in rows:
        for name, kind in row["kinds"].items():
            speed = kind.get("tokens_per_s_per_gpu", 0.0)
            if speed > best[name][1]["tokens_per_s_per_gpu"] if name in best else speed:
                best[name] = (row, kind)
    return best
