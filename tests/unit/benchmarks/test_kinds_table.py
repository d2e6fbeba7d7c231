"""benchmarks/kinds/table.py: the page's tables are those of the committed results."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from measuring.overlap import clock
from pretrain.bench.kinds_plan import BLOCKING, KINDS, NO_COMM

ROOT = Path(__file__).parents[3]


@pytest.fixture
def table() -> ModuleType:
    file = ROOT / "benchmarks/kinds/table.py"
    spec = importlib.util.spec_from_file_location("kinds_table", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["kinds_table"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_of_the_committed_results(table: ModuleType) -> None:
    file = ROOT / "benchmarks/results/overlap-kinds-cpu.json"
    reports = json.loads(file.read_text()) if file.exists() else {}
    page = (ROOT / "docs/results/overlap.md").read_text()
    assert table.with_tables(page, reports) == page


def test_a_table_has_measured_and_planned_shares_and_what_is_the_most(table: ModuleType) -> None:
    """Ladder's link of 0.1 s exposes a quarter of what a waiting standard layer does in forward."""
    standards, ladders = [(1.0, 2.0)] * 2, [(1.0, 3.0)] * 2
    seconds = {
        (BLOCKING, "zero"): standards,
        (BLOCKING, "link"): [(1.4, 2.4)] * 2,
        ("standard", "zero"): standards,
        ("standard", "link"): [(1.4, 2.2)] * 2,
        ("ladder", "zero"): ladders,
        ("ladder", "link"): [(1.1, 3.0)] * 2,
        (NO_COMM, "link"): [(0.5, 1.0)] * 2,
    }
    shares = {"standard": (0.0, 0.5), "ladder": (0.75, 1.0)}
    report = {
        "times_s": [{"kind": k, "link": w, "forward_backward": t} for (k, w), t in seconds.items()],
        "attention_mlp_s": [
            {"forward_s": 1.0, "backward_s": 2.0, "weight_gradient_s": 0.5} for _ in range(2)
        ],
        "hidden_share": {
            BLOCKING: {
                k: {"forward": f, "backward": b, "total": 0.0} for k, (f, b) in shares.items()
            }
        },
        **{"layers": 2, "own_s": 0.0, "link_s": 0.1, "link_ratio": 0.1},
        "left_out": {"standard in halves": "a micro-batch of 1 has no two equal halves"},
        "command": "python benchmarks/overlap.py --steps 2 --json a.json",
    }
    text = table.case_table(table.CASES["1-0.5"], report)
    # Two layers: of 4 sums in forward the last is exposed.
    expected = "| ladder | 0.750 ± 0.000 (0.750) | 1.000 ± 0.000 (1.000) | 0.750, 1.000 | 1.333 "
    assert expected in text
    assert "| standard | 0.000 ± 0.000 (0.000) | 0.500 ± 0.000 (1.000) |  | 1.000 " in text
    assert "| no-comm |  |  |  | 0.500 (0.500 to 0.500) | 0.417 " in text
    assert "standard in halves left out: a micro-batch of 1 has no two equal halves." in text
    assert "    python benchmarks/overlap.py --steps 2\n" in text
    assert len(KINDS) > 4 and "| parallel |" not in text


def test_only_what_is_between_the_markers_is_replaced(table: ModuleType) -> None:
    page = f"before\n{table.BEGIN}old\n{table.END}after\n"
    once = table.with_tables(page, {})
    assert once.startswith("before\n") and once.endswith("after\n") and "old" not in once
    assert table.with_tables(once, {}) == once
    with pytest.raises(AssertionError, match="the page needs the two lines"):
        table.with_tables("a page", {})


def test_a_clock_of_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits are added; time in which the thread does not run is not."""
    for module in (clock.wire, clock.decoder, clock.recorder):
        monkeypatch.setattr(module, "time", time)
    monkeypatch.setattr(clock, "_used", [])
    clock.restart()  # nothing is in use
    clock.use_processor_time()
    clock.restart()
    time.sleep(0.2)
    begin = clock.wire.time.perf_counter()
    assert 0 <= begin < 0.1
    clock.wire.sleep_until(begin + 5.0)
    assert 5.0 <= clock.decoder.time.perf_counter() - begin < 5.1
