"""Rendering of traces, against figures worked out by hand."""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from matplotlib.image import imread

from megatron_ladder.errors import UserError
from pretrain.bench import timeline
from pretrain.bench.timeline import Direction, Overlap, Span

MS = 1e-3


def span(
    kind: Literal["compute", "flight", "wait"],
    name: str,
    start_ms: float,
    end_ms: float,
    direction: Direction = "forward",
    rank: int = 0,
) -> Span:
    # A clock that does not start at zero, as perf_counter's does not.
    return Span(rank, kind, name, direction, 100 + start_ms * MS, 100 + end_ms * MS)


def model(ladder: bool, layers: int = 4, *, recompute: bool = False, rank: int = 0) -> list[Span]:
    """A made-up step: attention 6 ms, MLP 9 ms, a collective 5 ms; backward twice as long."""
    own = [f"{kind} {n}" for n in range(1, layers + 1) for kind in ("attention", "mlp")]
    spans: list[Span] = []
    now = 0.0

    def run(names: list[str], factor: float, direction: Direction) -> Iterator[None]:
        nonlocal now
        flying: list[tuple[str, float]] = []  # names and arrivals

        def wait() -> None:
            nonlocal now
            name, arrival = flying.pop(0)
            until = max(now, arrival) + 0.1
            spans.append(span("wait", name, now, until, direction, rank))
            now = until

        for name in names:
            if recompute and direction == "backward":
                spans.append(span("compute", name, now, now + 5, "recompute", rank))
                spans.append(span("flight", name, now + 5, now + 10, "recompute", rank))
                spans.append(span("wait", name, now + 5, now + 10, "recompute", rank))
                now += 10
            work = factor * (6 if name.startswith("attention") else 9)
            spans.append(span("compute", name, now, now + work, direction, rank))
            now += work
            spans.append(span("flight", name, now, now + 5, direction, rank))
            flying.append((name, now + 5))
            while len(flying) > (1 if ladder else 0):
                wait()
            yield
        while flying:
            wait()

    list(run(own, 1, "forward"))
    list(run(own[::-1], 2, "backward"))
    return spans


def events(spans: list[Span], ph: str) -> list[dict[str, Any]]:
    return [e for e in timeline.chrome_trace(spans)["traceEvents"] if e["ph"] == ph]


def names(spans: list[Span], what: str) -> list[str]:
    return [e["args"]["name"] for e in events(spans, "M") if e["name"] == f"{what}_name"]


def test_chrome_trace_by_hand() -> None:
    trace = timeline.chrome_trace(
        [
            span("compute", "mlp 3", 2, 5),
            span("flight", "mlp 3", 5, 9, "backward"),
            span("wait", "mlp 3", 7, 9.5, "backward"),
        ]
    )
    assert trace["displayTimeUnit"] == "ms"
    meta = {"ph": "M", "pid": 0}
    both = {"ph": "X", "pid": 0}
    flow = {"name": "collective", "cat": "collective", "id": 1, "pid": 0}
    backward = {"args": {"direction": "backward"}}
    assert trace["traceEvents"] == [
        meta | {"name": "process_name", "args": {"name": "rank 0"}},
        meta | {"name": "thread_name", "args": {"name": "compute"}, "tid": 1},
        meta | {"name": "thread_name", "args": {"name": "collectives"}, "tid": 101},
        both
        | {"name": "mlp 3", "cat": "compute", "tid": 1, "ts": 0, "dur": 3000}
        | {"args": {"direction": "forward"}},
        both
        | {"name": "wait for mlp 3", "cat": "wait", "tid": 1, "ts": 5000, "dur": 2500}
        | backward,
        both | {"name": "mlp 3", "cat": "flight", "tid": 101, "ts": 3000, "dur": 4000} | backward,
        flow | {"ph": "s", "tid": 101, "ts": 3000},
        flow | {"ph": "f", "bp": "e", "tid": 1, "ts": 7499.999},
    ]


@pytest.mark.parametrize("ladder", [False, True])
def test_threads_never_overlap_and_flows_pair_up(ladder: bool) -> None:
    spans = [s for rank in (0, 1) for s in model(ladder, recompute=True, rank=rank)]
    lanes = defaultdict(list)
    for event in events(spans, "X"):
        lanes[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for lane in lanes.values():
        # A nanosecond is 1e-3; sums of floats are not exact.
        assert all(end <= start + 1e-6 for (_, end), (start, _) in pairwise(sorted(lane)))
    assert len(events(spans, "X")) == len(spans)
    starts = {e["id"]: e for e in events(spans, "s")}
    ends = {e["id"]: e for e in events(spans, "f")}
    flights = sum(s.kind == "flight" for s in spans)
    assert flights == len(starts) == len(events(spans, "s")) == len(ends)
    assert starts.keys() == ends.keys()
    slices = {(e["pid"], e["tid"], e["cat"], e["ts"]): e for e in events(spans, "X")}
    waits = [e for e in events(spans, "X") if e["cat"] == "wait"]
    for number, start in starts.items():
        flight = slices[start["pid"], start["tid"], "flight", start["ts"]]
        end = ends[number]
        (wait,) = [
            e
            for e in waits
            if (e["pid"], e["tid"]) == (end["pid"], end["tid"])
            and e["ts"] <= end["ts"] < e["ts"] + e["dur"]
        ]
        assert wait["name"] == "wait for " + flight["name"]
        assert wait["args"] == flight["args"] and wait["pid"] == flight["pid"]


def test_overlapping_flights_get_further_threads() -> None:
    spans = [
        span("flight", "attention 1", 0, 10),
        span("flight", "mlp 1", 4, 6),  # inside the first
        span("flight", "attention 2", 5, 12),  # across both
        span("flight", "mlp 2", 10, 11),  # the first thread is free again
    ]
    assert names(spans, "thread") == ["collectives", "collectives 2", "collectives 3"]
    assert {e["name"]: e["tid"] for e in events(spans, "X")} == {
        "attention 1": 101,
        "mlp 1": 102,
        "attention 2": 103,
        "mlp 2": 101,
    }


def test_several_collectives_of_one_name_pair_in_order() -> None:
    # As sequence parallelism has them. The second flight arrives before the first wait.
    spans = [
        span("flight", "mlp 1", 0, 3),
        span("wait", "mlp 1", 8, 8.5),
        span("flight", "mlp 1", 1, 2),
        span("wait", "mlp 1", 9, 9.5),
        span("flight", "mlp 2", 1, 2),  # nobody waits for it
    ]
    pairs = zip(events(spans, "s"), events(spans, "f"), strict=True)
    assert [(s["ts"], f["ts"]) for s, f in pairs] == [(0, 8499.999), (1000, 9499.999)]


def test_written_trace_loads(tmp_path: Path) -> None:
    spans = model(ladder=True)
    timeline.write_chrome_trace(tmp_path / "trace.json", spans)
    assert json.loads((tmp_path / "trace.json").read_text()) == timeline.chrome_trace(spans)
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]
    assert timeline.chrome_trace([])["traceEvents"] == []


def test_overlap_by_hand() -> None:
    spans = [
        # Forward: rank 0 has 4 + 6 ms of link and 1 + 0 exposed, rank 1 has 10 and 3.
        span("flight", "attention 1", 0, 4),
        span("wait", "attention 1", 3, 4),
        span("flight", "mlp 1", 4, 10),
        span("flight", "attention 1", 0, 5, rank=1),
        span("wait", "attention 1", 2, 5, rank=1),
        span("flight", "mlp 1", 5, 10, rank=1),
        # Backward: nothing in flight, though a sub-module computes.
        span("compute", "mlp 1", 12, 14, "backward"),
        # Recomputed on rank 0 alone, all of it exposed.
        span("flight", "mlp 1", 20, 22, "recompute"),
        span("wait", "mlp 1", 20, 22, "recompute"),
    ]
    result = timeline.overlap(spans)
    assert list(result) == ["forward", "recompute"]
    assert _rounded(result["forward"]) == Overlap(2, 0.010, 0.002, 0.8)
    assert _rounded(result["recompute"]) == Overlap(0, 0.001, 0.001, 0.0)
    assert timeline.overlap([span("flight", "mlp 1", 3, 3)])["forward"].hidden_share == 1.0


def _rounded(o: Overlap) -> Overlap:
    return Overlap(
        o.collectives, round(o.link_s, 9), round(o.exposed_s, 9), round(o.hidden_share, 9)
    )


def test_table() -> None:
    text = timeline.table([("standard", model(False)), ("ladder", model(True))])
    # Standard: 8 collectives of 5 ms, each with a wait of 5.1. Ladder: each is waited for 0.1 ms
    # after the next computation, the last of a direction 5 ms longer less the 0.1 before it.
    assert text.splitlines() == [
        "kind      direction  collectives  link ms  exposed ms  hidden share",
        "standard  forward              8     40.0        40.8           -2%",
        "standard  backward             8     40.0        40.8           -2%",
        "ladder    forward              8     40.0         5.7           86%",
        "ladder    backward             8     40.0         5.7           86%",
    ]


@pytest.mark.parametrize("recompute", [False, True])
def test_draw(tmp_path: Path, recompute: bool) -> None:
    rows = [(k, model(k == "ladder", recompute=recompute)) for k in ("standard", "ladder")]
    timeline.draw(tmp_path / "timeline.png", rows, layers=(3, 4))
    picture = imread(tmp_path / "timeline.png")
    assert picture.shape[:2] == (700, 1400)
    quarters = [half for rows_ in (picture[:350], picture[350:]) for half in _halves(rows_)]
    for quarter in quarters:
        for colour in (timeline.ATTENTION, timeline.MLP, timeline.LINK, timeline.WAIT):
            assert _has(quarter, colour), colour


def _halves(picture: Any) -> tuple[Any, Any]:
    return picture[:, :700], picture[:, 700:]


def _has(picture: Any, colour: str) -> bool:
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return bool((abs(picture[..., :3] - rgb).max(axis=-1) < 0.02).sum() > 20)


def test_draw_one_direction_and_shared_collectives(tmp_path: Path) -> None:
    spans = [
        span("compute", "attention 1", 0, 4),
        span("compute", "mlp 1", 4, 8),
        span("flight", "layer 1", 8, 10),
        span("wait", "layer 1", 8, 10),
        span("compute", "attention 2", 10, 14),
        span("compute", "final norm", 14, 15),
    ]
    timeline.draw(tmp_path / "timeline.png", [("parallel", spans)], layers=(1, 2))
    assert imread(tmp_path / "timeline.png").shape[:2] == (400, 1400)


def test_halves_belong_to_their_layer(tmp_path: Path) -> None:
    spans = [
        span("compute", "attention 1a", 0, 6),
        span("compute", "attention 1b", 6, 12),
        span("flight", "attention 1a", 6, 11),
        span("wait", "attention 1a", 12, 12.1),
        span("compute", "mlp 2a", 12.1, 20),
    ]
    timeline.draw(tmp_path / "t.png", [("standard in halves", spans)], layers=(1, 2))
    with pytest.raises(UserError, match=r"of layer 3 .it has layers: 1, 2.;"):
        timeline.draw(tmp_path / "t.png", [("standard in halves", spans)], layers=(2, 3))


def test_draw_says_which_layers_are_missing(tmp_path: Path) -> None:
    # Another rank's layers do not count.
    rows = [("ladder", model(True, layers=2) + model(True, layers=6, rank=1))]
    with pytest.raises(UserError, match=r"ladder: .*no span of layer 3 or 4 .*layers: 1, 2\)"):
        timeline.draw(tmp_path / "timeline.png", rows, layers=(3, 4))
    with pytest.raises(UserError, match="layers: none"):
        timeline.draw(tmp_path / "timeline.png", [("ladder", [])], layers=(1, 2))
    with pytest.raises(UserError, match="no trace"):
        timeline.draw(tmp_path / "timeline.png", [], layers=(1, 2))
    assert list(tmp_path.iterdir()) == []


def test_imports_no_torch() -> None:
    code = "import sys, pretrain.bench.timeline; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
