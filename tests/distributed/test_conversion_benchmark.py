"""The benchmark of import and export, on a model of a few kilobytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_measures_every_line(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    shape = ["--shape", "2", "32", "48", "4", "2", "300"]
    options = ["--rounds", "1", "--work", str(tmp_path / "work"), "--json", str(file)]
    output = subprocess.run(
        [sys.executable, "benchmarks/commands/conversion.py", *shape, *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    ).stdout
    found = json.loads(file.read_text())
    assert found["largest_tensor_bytes"] == 300 * 32 * 2
    lines = {run["line"]: run for run in found["runs"]}
    assert set(lines) == set(found["medians"])
    assert "not verified" in lines["export, not verified"]["said"]
    assert "fp32, whole" in lines["export"]["said"]
    assert "fp32, layer by layer" in lines["export, verified by layers"]["said"]
    assert all(run["work_s"] > 0 for run in lines.values())
    assert "| import |" in output
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["model"]
