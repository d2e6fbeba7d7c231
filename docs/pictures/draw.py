"""Draws the pictures of README and docs: python docs/pictures/draw.py (matplotlib)."""

from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).parent
ATTENTION, MLP, REDUCE = "#0072B2", "#009E73", "#D55E00"
GREY, INK = "#d9d9d9", "#222222"


def box(
    axes: Axes, x: float, y: float, w: float, h: float, text: str, colour: str, size: float = 10
) -> None:
    style = "round,pad=0,rounding_size=0.06"
    patch = FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor=colour, edgecolor="white")
    axes.add_patch(patch)
    tone = INK if colour in (GREY, "#f2f2f2") else "white"
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", color=tone, fontsize=size)


def arrow(axes: Axes, start: tuple, end: tuple, colour: str = INK, curve: float = 0.0) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=12,
            color=colour,
            linewidth=1.4,
            connectionstyle=f"arc3,rad={curve}",
            shrinkA=0,
            shrinkB=0,
        )
    )


def canvas(width: float, height: float, x: tuple, y: tuple) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    axes.axis("off")
    return figure, axes


def save(figure: Figure, name: str) -> None:
    FigureCanvasSVG(figure)
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
    figure.savefig(HERE / f"{name}.png", dpi=110)


def standard_vs_ladder() -> None:
    """Two layers' timeline under tensor parallelism; lengths are schematic."""
    compute, reduce = 2.0, 1.2
    figure, axes = canvas(10, 4.3, (-2.1, 13.6), (-0.75, 5.35))
    modules = [("attn 1", ATTENTION), ("MLP 1", MLP), ("attn 2", ATTENTION), ("MLP 2", MLP)]
    rows = {"standard": (4.0, 3.35), "ladder": (1.6, 0.95)}
    ends = {}
    for name, (top, bottom) in rows.items():
        axes.text(-1.95, (top + bottom + 0.55) / 2, name, fontsize=13, weight="bold", va="center")
        axes.text(
            -0.15, top + 0.28, "compute", ha="right", va="center", fontsize=9, color="#555555"
        )
        axes.text(
            -0.15, bottom + 0.28, "all-reduce", ha="right", va="center", fontsize=9, color="#555555"
        )
        t = 0.0
        for i, (label, colour) in enumerate(modules):
            box(axes, t, top, compute, 0.55, label, colour)
            box(axes, t + compute, bottom, reduce, 0.55, f"sum {label}", REDUCE, 8)
            hidden = name == "ladder" and i < len(modules) - 1
            t += compute + (0 if hidden else reduce)
        ends[name] = t
    saved = (ends["ladder"], ends["standard"])
    for x in saved:
        axes.plot([x, x], [0.2, 4.9], color="#999999", linewidth=1, linestyle=":")
    axes.annotate("", (saved[0], 0.35), (saved[1], 0.35), arrowprops={"arrowstyle": "<->"})
    axes.text(sum(saved) / 2, 0.05, "saved", ha="center", va="top", fontsize=10)
    axes.text(
        -1.95,
        -0.6,
        "Schematic. A ladder sub-module does not read the sum of the sub-module before it, so that "
        "sum can run at the same time.",
        fontsize=9,
        color="#555555",
    )
    axes.text(-1.95, 5.0, "Two layers under tensor parallelism", fontsize=12)
    save(figure, "standard_vs_ladder")


def residual_kinds() -> None:
    """Which state each sub-module reads."""
    figure, axes = canvas(13, 4.6, (0, 20), (-0.35, 6.6))
    for column, (name, equation) in enumerate(
        (
            ("standard", "x[k] = x[k-1] + sum h[k](norm(x[k-1]))"),
            ("ladder", "x[k] = x[k-1] + sum h[k](norm(x[k-2]))"),
            ("parallel", "x[l] = x[l-1] + sum (attn + mlp)(norm(x[l-1]))"),
            ("parallel-ladder", "x[l] = x[l-1] + sum (attn + mlp)(norm(x[l-2]))"),
        )
    ):
        x = 0.6 + 5 * column
        axes.text(x, 6.15, name, fontsize=13, weight="bold")
        axes.text(x, 5.75, equation, fontsize=7.6, color="#444444")
        axes.plot([x + 0.5, x + 0.5], [0.2, 5.4], color="#888888", linewidth=3, zorder=0)
        axes.text(
            x + 0.5, -0.05, "residual stream", ha="center", va="top", fontsize=8, color="#666666"
        )
        if name.startswith("parallel"):
            for y in (1.3, 3.7):
                stale = 2.4 if name.endswith("ladder") else 0.0
                source = max(0.35, y - 0.45 - stale)
                for place, label, colour in ((1.7, "attn", ATTENTION), (3.0, "MLP", MLP)):
                    box(axes, x + place, y, 1.0, 0.6, label, colour)
                    arrow(axes, (x + 0.5, source), (x + place + 0.5, y), colour, curve=0.08)
                    arrow(axes, (x + place + 0.5, y + 0.6), (x + 0.5, y + 1.2), REDUCE)
            axes.text(x + 0.7, 5.05, "one sum a layer", fontsize=8, color=REDUCE)
            continue
        for k, (label, colour) in enumerate(
            (("attn", ATTENTION), ("MLP", MLP), ("attn", ATTENTION))
        ):
            y = 1.0 + 1.65 * k
            stale = 1.65 if name == "ladder" else 0.0
            box(axes, x + 2.1, y, 1.1, 0.6, label, colour)
            source = max(0.35, y - 0.45 - stale)
            arrow(axes, (x + 0.5, source), (x + 2.6, y), colour, curve=0.12)
            arrow(axes, (x + 2.6, y + 0.6), (x + 0.5, y + 0.95), REDUCE)
        axes.text(x + 0.75, 2.0, "sum", fontsize=8, color=REDUCE)
    save(figure, "residual_kinds")


def data_flow() -> None:
    """Stages, and the files between them."""
    figure, axes = canvas(11, 2.6, (0, 22), (0, 5.2))
    stages = [
        (0.2, "text\nJSONL, plain,\nfolders", "#f2f2f2"),
        (4.0, "data_prep\ntokenizer,\ntokenize", ATTENTION),
        (7.8, "data set\n.bin .idx\nmanifest", "#f2f2f2"),
        (11.6, "pretrain\nmegatron_ladder\nmegatron-core", ATTENTION),
        (15.4, "run\ncheckpoints,\nmetrics", "#f2f2f2"),
        (19.2, "Hugging Face\nfolder", "#f2f2f2"),
    ]
    for x, text, colour in stages:
        box(axes, x, 2.6, 2.6, 1.7, text, colour)
    for (x, _, _), (following, _, _) in pairwise(stages):
        arrow(axes, (x + 2.65, 3.45), (following - 0.05, 3.45))
    axes.text(18.62, 3.65, "export", ha="center", fontsize=8.5)
    box(axes, 15.4, 0.4, 2.6, 0.9, "report", MLP)
    arrow(axes, (16.7, 2.6), (16.7, 1.35))
    box(axes, 19.2, 0.4, 2.6, 0.9, "generate", MLP)
    arrow(axes, (20.5, 2.6), (20.5, 1.35))
    axes.text(
        0.2, 0.55, "Data flows one way; stages share files, not code.", fontsize=10, color="#555555"
    )
    save(figure, "data_flow")


def data_path() -> None:
    """Commands of data_prep, from a dump to what training reads."""
    figure, axes = canvas(11, 2.7, (0, 22), (0, 5.4))
    stages = [
        (0.2, "dump\n.jsonl .zst .gz\n.parquet, URLs", "#f2f2f2"),
        (3.95, "clean\nduplicates,\nquality", GREY),
        (7.7, "tokenize\na part a process\nor a task", ATTENTION),
        (11.45, "merge\n(after a job\narray)", ATTENTION),
        (15.2, "data set\n.bin .idx\nmanifest", "#f2f2f2"),
        (19.0, "blend\nweights", ATTENTION),
    ]
    for x, text, colour in stages:
        box(axes, x, 2.8, 2.75, 1.7, text, colour, 9.5)
    for (x, _, _), (following, _, _) in pairwise(stages):
        arrow(axes, (x + 2.8, 3.65), (following - 0.05, 3.65))
    box(axes, 3.95, 0.5, 6.5, 0.9, "train-tokenizer", GREY, 9.5)
    arrow(axes, (9.08, 1.4), (9.08, 2.75))
    box(axes, 13.0, 0.5, 5.2, 0.9, "inspect, verify, stats", MLP, 9.5)
    arrow(axes, (16.57, 2.8), (16.57, 1.45))
    box(axes, 19.0, 0.5, 2.75, 0.9, "train --config", "#f2f2f2", 9.5)
    arrow(axes, (20.37, 2.8), (20.37, 1.45))
    axes.text(0.2, 4.85, "grey: as needed", fontsize=9.5, color="#555555")
    save(figure, "data_path")


if __name__ == "__main__":
    standard_vs_ladder()
    residual_kinds()
    data_flow()
    data_path()
