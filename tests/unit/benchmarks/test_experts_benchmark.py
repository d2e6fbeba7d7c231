"""benchmarks/kinds/experts.py: what a layer can hide at most, and models that the trainer accepts."""

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_ladder.config import ParallelConfig, check_layout

FILE = Path(__file__).parents[3] / "benchmarks/kinds/experts.py"


def test_what_can_be_hidden_and_the_models() -> None:
    spec = importlib.util.spec_from_file_location("kinds_experts", FILE)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert benchmark.most(6, shared=True) == 1
    assert benchmark.most(6, shared=False) == pytest.approx(11 / 12)
    sizes = Namespace(
        layers=2, hidden_size=64, expert_size=32, seq_length=16, experts=4, top_k=2, fake_ranks=None
    )
    for residual, shared in benchmark.KINDS.values():
        model = benchmark.model_of(sizes, residual, shared)
        check_layout(model, ParallelConfig(expert_model_parallel_size=benchmark.RANKS))
        has_shared = model.experts.moe_shared_expert_intermediate_size is not None
        assert (model.residual, has_shared) == (residual, shared)


def test_one_rank_of_eight_is_measured_alone(tmp_path: Path) -> None:
    """As on a GPU, at a hundredth of the size and without one: a crash there costs minutes."""
    file = tmp_path / "experts.json"
    sizes = (
        "--fake-ranks 8 --experts 8 --layers 1 --hidden-size 32 --expert-size 16 --seq-length 16"
    )
    sizes += " --micro-batch-size 1 --link-ms 1 --steps 2"
    command = [sys.executable, str(FILE), *sizes.split(), "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["kind"] for row in rows[::2]] == [
        "standard, shared expert",
        "ladder, shared expert",
        "standard",
        "ladder",
    ]
    # Dispatch and combine, and tokens' weights: a pass of one layer.
    assert all(0.0019 < row["link_s"] < 0.0023 for row in rows)
