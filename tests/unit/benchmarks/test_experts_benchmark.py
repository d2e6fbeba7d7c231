"""benchmarks/kinds/experts.py: what a layer can hide at most, and models that the trainer accepts."""

import importlib.util
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_ladder.config import check_layout

FILE = Path(__file__).parents[3] / "benchmarks/kinds/experts.py"


def test_what_can_be_hidden_and_the_models() -> None:
    spec = importlib.util.spec_from_file_location("kinds_experts", FILE)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert benchmark.most(6, shared=True) == 1
    assert benchmark.most(6, shared=False) == pytest.approx(11 / 12)
    sizes = Namespace(layers=2, hidden_size=64, expert_size=32, seq_length=16)
    for residual, shared in benchmark.KINDS.values():
        model = benchmark.model_of(sizes, residual, shared)
        check_layout(model, benchmark.PARALLEL)
        has_shared = model.experts.moe_shared_expert_intermediate_size is not None
        assert (model.residual, has_shared) == (residual, shared)
