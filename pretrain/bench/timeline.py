"""Shows what a trace has recorded: as Chrome's JSON, as a picture of two layers, and as a table."""

import io
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_ladder.errors import UserError
from pretrain.files import write_atomically

Direction = Literal["forward", "backward", "recompute"]

# Okabe and Ito's colours, as in pretrain/pictures.py; TEXT_ON has a text colour that is readable on each.
ATTENTION, MLP, LINK, OTHER = "#0072B2", "#E69F00", "#009E73", "#999999"
WAIT = "#D55E00"
TEXT_ON = {ATTENTION: "white", MLP: "black", LINK: "white", OTHER: "black"}
PALE = 0.3  # opacity of spans of other layers than the two shown
DPI = 130
COMPUTE_LANE, LINK_LANE, LANE_HEIGHT = 1.0, 0.0, 0.84

# A picture's columns; recomputation is part of backward's time.
COLUMNS: dict[str, tuple[Direction, ...]] = {
    "forward": ("forward",),
    "backward": ("backward", "recompute"),
}


@dataclass(frozen=True)
class Span:
    """A time span in which a rank, or its collective, did one thing. Times are seconds of one clock."""

    rank: int
    kind: Literal["compute", "flight", "wait"]
    """compute: a sub-module's own work; flight: its collective, from its start until it is complete;
    wait: the rank does nothing until that collective is complete."""
    name: str
    """The sub-module: "attention 3", "mlp 3", or "layer 3" where both share one collective. Of two halves
    of a micro-batch "attention 3a" and "attention 3b"."""
    direction: Direction
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Overlap:
    """The collectives of one direction, as the mean over ranks."""

    collectives: int
    link_s: float
    """Seconds that collectives were in flight, summed over the collectives."""
    exposed_s: float
    """Seconds that the rank waited for them."""
    hidden_share: float
    """1 - exposed_s / link_s. Below zero if ranks waited longer than collectives were in flight."""


def chrome_trace(spans: Iterable[Span]) -> dict[str, Any]:
    """Spans as a trace for ui.perfetto.dev or chrome://tracing.

    Each rank is a process of the trace. One thread holds computations and waits, another one the
    collectives. Spans that overlap on a thread go to further threads ("collectives 2"), because viewers
    would draw them nested. An arrow leads from each collective's start to the end of the wait for it.
    The k-th flight and the k-th wait of one rank, name and direction, in the order given, belong together.

    Returns:
        Object for JSON; times in microseconds from the earliest span, to the nanosecond.
    """
    spans = list(spans)
    origin_s = min((span.start_s for span in spans), default=0.0)
    metadata: list[dict[str, Any]] = []
    slices: list[dict[str, Any]] = []
    threads: dict[int, int] = {}  # by a span's id(): two spans may be equal
    for rank in sorted({span.rank for span in spans}):
        metadata.append(_name(rank, "process", f"rank {rank}"))
        # Perfetto treats thread 0 of process 0 as the idle thread, so numbers start at 1.
        for group, kinds, first in (
            ("compute", ("compute", "wait"), 1),
            ("collectives", ("flight",), 101),
        ):
            lanes = _lanes(s for s in spans if s.rank == rank and s.kind in kinds)
            for thread, lane in enumerate(lanes, first):
                label = group if thread == first else f"{group} {thread - first + 1}"
                metadata.append(_name(rank, "thread", label, thread))
                for span in lane:
                    threads[id(span)] = thread
                    slices.append(_slice(span, thread, origin_s))
    flows: list[dict[str, Any]] = []
    for number, (flight, wait) in enumerate(_pairs(spans), 1):
        # One nanosecond before the wait's end, because at the very end a viewer may attach the arrow to the
        # next slice.
        start_ns, end_ns = _ns(wait.start_s, origin_s), _ns(wait.end_s, origin_s)
        at_us = max(start_ns, end_ns - 1) / 1000
        common = {"name": "collective", "cat": "collective", "id": number, "pid": flight.rank}
        begin = {"ph": "s", "tid": threads[id(flight)], "ts": _ns(flight.start_s, origin_s) / 1000}
        end = {"ph": "f", "bp": "e", "tid": threads[id(wait)], "ts": at_us}
        flows += [common | begin, common | end]
    # Arrows come last: at equal times a viewer attaches an arrow to the slice that it read before it.
    return {"traceEvents": metadata + slices + flows, "displayTimeUnit": "ms"}


def write_chrome_trace(path: Path, spans: Iterable[Span]) -> None:
    """Writes chrome_trace's object as JSON, atomically."""
    write_atomically(path, json.dumps(chrome_trace(spans)))


def overlap(spans: Iterable[Span]) -> dict[Direction, Overlap]:
    """The share of the collectives' time that was hidden, by direction, as the mean over ranks.

    Returns:
        Times in seconds, without directions that have no flight.
    """
    spans = list(spans)
    ranks = len({span.rank for span in spans})
    result: dict[Direction, Overlap] = {}
    for direction in get_args(Direction):
        of_direction = [span for span in spans if span.direction == direction]
        flights = [span for span in of_direction if span.kind == "flight"]
        if flights:
            link_s = _seconds(flights) / ranks
            exposed_s = _seconds(s for s in of_direction if s.kind == "wait") / ranks
            share = 1 - exposed_s / link_s if link_s else 1.0
            result[direction] = Overlap(round(len(flights) / ranks), link_s, exposed_s, share)
    return result


def table(rows: list[tuple[str, list[Span]]]) -> str:
    """Text table of each kind's overlap by direction; times in ms, as the mean over ranks."""
    lines = [("kind", "direction", "collectives", "link ms", "exposed ms", "hidden share")]
    for kind, spans in rows:
        for direction, o in overlap(spans).items():
            times = (f"{1e3 * o.link_s:.1f}", f"{1e3 * o.exposed_s:.1f}")
            lines.append((kind, direction, str(o.collectives), *times, f"{o.hidden_share:.0%}"))
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def draw(path: Path, rows: list[tuple[str, list[Span]]], *, layers: tuple[int, int]) -> None:
    """Writes a PNG timeline of two neighbouring layers on rank 0, a row of panels for each kind.

    Forward is on the left; backward, with recomputation if there is any, is on the right. Times are in ms
    from the first span shown, with one scale for each column. A panel shows the time from the first to the
    last span of the two layers; spans of other layers in that time are paler. The exposed time in the title
    is that of the two layers' own collectives, so that kinds are compared over the same collectives.

    Raises:
        UserError: there is nothing to draw, or a kind has no span of one of the layers.
    """
    if not rows:
        raise UserError("there is no trace to draw")
    for kind, spans in rows:
        _check_layers(kind, spans, layers)
    happened = {s.direction for _, spans in rows for s in spans}
    columns = {name: which for name, which in COLUMNS.items() if happened & {*which}}
    figure = Figure(figsize=(1400 / DPI, (100 + 300 * len(rows)) / DPI), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharex="col", sharey=True)
    labels: list[tuple[Any, Any]] = []
    for column, (name, directions) in enumerate(columns.items()):
        longest_ms = 0.0
        for row, (kind, spans) in enumerate(rows):
            panel = [s for s in spans if s.rank == 0 and s.direction in directions]
            shown_ms = _draw_panel(axes[row, column], f"{kind}, {name}", panel, layers, labels)
            longest_ms = max(longest_ms, shown_ms)
        axes[0, column].set_xlim(0, longest_ms * 1.01 or 1)
        axes[-1, column].set_xlabel("ms")
    figure.suptitle(f"Layers {layers[0]} and {layers[1]}, rank 0", fontsize=11)
    any_recompute = any(s.direction == "recompute" and s.rank == 0 for _, ss in rows for s in ss)
    figure.legend(
        handles=_legend(any_recompute),
        loc="outside lower center",
        ncols=6,
        frameon=False,
        fontsize=9,
    )
    figure.draw_without_rendering()  # settles the layout, so that labels can be measured
    for label, bar in labels:
        _fit(label, bar)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    write_atomically(path, buffer.getvalue())


def _draw_panel(
    axes: Any,
    title: str,
    spans: list[Span],
    layers: tuple[int, int],
    labels: list[tuple[Any, Any]],
) -> float:
    """Draws a panel and appends its labels with their bars to `labels`; returns the ms that it shows."""
    axes.set_yticks([COMPUTE_LANE, LINK_LANE], ["compute", "link"])
    axes.set_ylim(-0.5, 1.5)
    axes.tick_params(labelsize=9, labelbottom=True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    own = [s for s in spans if _layer(s) in layers]
    if not own:
        axes.set_title(f"{title}: nothing recorded", fontsize=10, loc="left")
        return 0.0
    flights_ms = 1e3 * _seconds(s for s in own if s.kind == "flight")
    exposed_ms = 1e3 * _seconds(s for s in own if s.kind == "wait")
    axes.set_title(
        f"{title}: {exposed_ms:.1f} ms exposed of {flights_ms:.1f} ms of collectives",
        fontsize=10,
        loc="left",
    )
    start_s, end_s = min(s.start_s for s in own), max(s.end_s for s in own)
    shown = [s for s in spans if s.end_s > start_s and s.start_s < end_s]
    computing = [s for s in shown if s.kind != "flight"]
    flight_lanes = _lanes(s for s in shown if s.kind == "flight")
    height = LANE_HEIGHT / max(1, len(flight_lanes))
    top = LINK_LANE + LANE_HEIGHT / 2
    places = [(s, COMPUTE_LANE, LANE_HEIGHT) for s in computing]
    for number, lane in enumerate(flight_lanes):
        places += [(s, top - (number + 0.5) * height, height) for s in lane]
    for span, y, thickness in places:
        left_ms = 1e3 * (max(span.start_s, start_s) - start_s)
        width_ms = 1e3 * (min(span.end_s, end_s) - start_s) - left_ms
        opacity = 1.0 if _layer(span) in layers else PALE
        (bar,) = axes.barh(
            y, width_ms, thickness, left=left_ms, linewidth=0.6, alpha=opacity, **_style(span)
        )
        if span.kind != "wait":
            # White would not be readable on a pale bar.
            colour = TEXT_ON[_colour(span)] if opacity == 1.0 else "black"
            text = span.name.replace("attention", "attn")
            centre = (left_ms + width_ms / 2, y)
            label = axes.text(
                *centre, text, ha="center", va="center", fontsize=8, color=colour, clip_on=True
            )
            labels.append((label, bar))
    return 1e3 * (end_s - start_s)


def _check_layers(kind: str, spans: list[Span], layers: tuple[int, int]) -> None:
    present = {layer for s in spans if s.rank == 0 and (layer := _layer(s)) is not None}
    missing = [str(layer) for layer in layers if layer not in present]
    if missing:
        there = ", ".join(str(layer) for layer in sorted(present)) or "none"
        raise UserError(
            f"{kind}: rank 0's trace has no span of layer {' or '.join(missing)} "
            f"(it has layers: {there}); choose two of those"
        )


def _legend(recompute: bool) -> list[Patch]:
    shades = [("attention", ATTENTION), ("MLP", MLP), ("collective in flight", LINK)]
    handles = [Patch(facecolor=colour, label=label) for label, colour in shades]
    handles.append(Patch(**_WAIT_STYLE, label="waiting (exposed)"))
    if recompute:
        handles.append(Patch(facecolor=OTHER, **_RECOMPUTE_STYLE, label="recomputation"))
    return [*handles, Patch(facecolor=OTHER, alpha=PALE, label="paler: other layers")]


_WAIT_STYLE: dict[str, Any] = {"facecolor": "white", "edgecolor": WAIT, "hatch": "//////"}
_RECOMPUTE_STYLE: dict[str, Any] = {"edgecolor": "white", "hatch": "...."}


def _style(span: Span) -> dict[str, Any]:
    if span.kind == "wait":
        return _WAIT_STYLE
    plain = {"facecolor": _colour(span), "edgecolor": "white"}
    return plain | _RECOMPUTE_STYLE if span.direction == "recompute" else plain


def _colour(span: Span) -> str:
    if span.kind == "flight":
        return LINK
    return {"attention": ATTENTION, "mlp": MLP}.get(span.name.split()[0], OTHER)


def _fit(label: Any, bar: Any) -> None:
    """Turns a label upright if it is wider than its bar, and hides it if it does not fit then either."""
    room = bar.get_window_extent()
    for rotation in (0, 90):
        label.set_rotation(rotation)
        size = label.get_window_extent()
        if size.width + 2 <= room.width and size.height + 2 <= room.height:
            return
    label.set_visible(False)


def _layer(span: Span) -> int | None:
    """The number at a name's end; None if there is none, as for an embedding."""
    last = span.name.split()[-1].rstrip("ab")  # without the half
    return int(last) if last.isdigit() else None


def _lanes(spans: Iterable[Span]) -> list[list[Span]]:
    """Spans by their start, each in the first lane in which it overlaps no other span."""
    lanes: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: (s.start_s, s.end_s)):
        free = next((lane for lane in lanes if lane[-1].end_s <= span.start_s), None)
        if free is None:
            lanes.append([span])
        else:
            free.append(span)
    return lanes


def _pairs(spans: list[Span]) -> list[tuple[Span, Span]]:
    """Each flight with its wait, without flights that no rank has waited for."""
    waits: dict[tuple[int, str, str], list[Span]] = defaultdict(list)
    flights: dict[tuple[int, str, str], list[Span]] = defaultdict(list)
    for span in spans:
        if span.kind != "compute":
            of_kind = waits if span.kind == "wait" else flights
            of_kind[span.rank, span.name, span.direction].append(span)
    return [p for key in flights for p in zip(flights[key], waits[key], strict=False)]


def _slice(span: Span, thread: int, origin_s: float) -> dict[str, Any]:
    # Both ends are rounded, not the duration: else spans that touch could overlap.
    start_ns, end_ns = _ns(span.start_s, origin_s), _ns(span.end_s, origin_s)
    return {
        "ph": "X",
        # A wait is on the thread of computations, where the name alone would mean the sub-module's work.
        "name": f"wait for {span.name}" if span.kind == "wait" else span.name,
        "cat": span.kind,
        "pid": span.rank,
        "tid": thread,
        "ts": start_ns / 1000,
        "dur": (end_ns - start_ns) / 1000,
        "args": {"direction": span.direction},
    }


def _name(rank: int, what: str, name: str, thread: int = 0) -> dict[str, Any]:
    event = {"ph": "M", "name": f"{what}_name", "pid": rank, "args": {"name": name}}
    return event | ({"tid": thread} if thread else {})


def _ns(time_s: float, origin_s: float) -> int:
    return round((time_s - origin_s) * 1e9)


def _seconds(spans: Iterable[Span]) -> float:
    return sum(span.end_s - span.start_s for span in spans)
