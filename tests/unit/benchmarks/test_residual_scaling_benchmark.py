"""benchmarks/depth/residual_scaling.py: its arithmetic, and a small case."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from depth.residual_scaling import (
    Text,
    draw,
    expected,
    grown,
    growth_table,
    learning_table,
    trained_once,
)
from tests.data_sets import write_data_set


def test_predictions_by_hand() -> None:
    first = (0.25, 0.5)
    assert expected(first, 1.0, True, "ladder", 8) == pytest.approx(math.sqrt(1 + 4 * 0.75))
    assert expected(first, 0.5, True, "parallel", 8) == pytest.approx(math.sqrt(1 + 0.75))
    a_layer = math.sqrt(1.25 * 1.5)
    assert expected(first, 1.0, False, "ladder", 8) == pytest.approx(a_layer**4)
    assert expected(first, 1.0, False, "parallel", 8) == pytest.approx(math.sqrt(1.75) ** 4)
    assert expected(first, 0.0, False, "ladder", 8) == 1
    # 1/sqrt(n) at a great depth: e^(r/2), with r the mean square; 1/n: none.
    deep = 20_000
    assert expected(first, deep**-0.5, False, "ladder", deep) == pytest.approx(
        math.exp(0.375 / 2), rel=1e-3
    )
    assert expected(first, 1 / deep, False, "ladder", deep) == pytest.approx(1, rel=1e-3)


def test_a_small_case() -> None:
    options = SimpleNamespace(kinds=["ladder", "parallel"], layers=[2, 6], hidden_size=32, draws=2)
    rows = grown(options)
    assert len(rows) == 2 * 2 * 4 * 2
    found = {(r["kind"], r["norms"], r["scaling"], r["layers"]): r for r in rows}
    for kind in options.kinds:
        # With norms the two predictions, which know of different things, are near what is measured.
        for scaling in ("none", "1/sqrt-n", "1/n"):
            for layers in options.layers:
                row = found[kind, True, scaling, layers]
                assert row["first_layer"] == pytest.approx(row["measured"], rel=0.3)
                assert row["each_output"] == pytest.approx(row["measured"], rel=0.2)
        assert found[kind, True, "none", 6]["measured"] > found[kind, True, "none", 2]["measured"]
        for norms in (True, False):
            assert found[kind, norms, "skipinit", 6]["measured"] == pytest.approx(1)
    assert growth_table(rows).count("\n") == len(rows) + 1
    assert draw(rows, [], "ladder", options.layers).axes


def test_two_runs(tmp_path: Path) -> None:
    data = write_data_set(tmp_path / "data", vocab_size=64)
    options = SimpleNamespace(
        **{"kind": "ladder", "train_layers": 2, "train_hidden_size": 16, "lr": 1e-2, "steps": 20},
        **{"sequences": 4, "seq_length": 16},
    )
    runs = [
        trained_once(options, Text(data, 16), scaling, norms, 1)
        for scaling, norms in (("skipinit", True), ("1/sqrt-n", False))
    ]
    for found in runs:
        assert found["validation"][-1] < found["validation"][0]
        assert len(found["training"]) == 20
    assert [len(layer) for layer in runs[0]["scales"]] == [2, 2]
    runs.append({**runs[0], "scaling": "none", "training": [None], "validation": []})
    last = f"{runs[0]['validation'][-1]:.4f}"
    table = learning_table(runs, [1, 2])
    assert f"| norms | skipinit | {last} |  | {last} |" in table
    assert "| norms | none | NaN |  | NaN |" in table
