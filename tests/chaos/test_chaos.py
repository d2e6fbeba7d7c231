"""Trainings under random faults: they end by themselves, lose little, and compute the same."""

from pathlib import Path

import pytest

from tests.chaos.run import Options, chaos, table
from tests.slurm.cluster import missing


def test_a_few_faults_on_this_machine(tmp_path: Path) -> None:
    kinds = ("a bit flipped, SIGKILL", "NaN", "disk full")
    results = chaos(Options(faults=3, steps=25, launcher="local", kinds=kinds), tmp_path)
    assert len(results["faults"]) == 3
    print(table(results))


EXPERTS = (
    *("--model.residual", "ladder", "--model.experts.num-moe-experts", "4"),
    *("--model.experts.moe-ffn-hidden-size", "48", "--parallel.expert-model-parallel-size", "2"),
    *("--model.experts.moe-router-score-function", "sigmoid"),
    "--model.experts.moe-router-enable-expert-bias",
)


@pytest.mark.slow
def test_a_mixture_is_killed_and_goes_on(tmp_path: Path) -> None:
    """Two ranks, each with half of the experts, in ladder layers; the biases' last move is not repeated."""
    kinds = ("SIGKILL of a rank", "NaN")
    results = chaos(Options(2, steps=20, launcher="local", kinds=kinds, train=EXPERTS), tmp_path)
    assert {fault["kind"] for fault in results["faults"]} == set(kinds)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thirty_faults_on_a_cluster(tmp_path: Path) -> None:
    if why := missing():
        pytest.skip(why)
    results = chaos(Options(), tmp_path)
    print(table(results))
    assert len(results["faults"]) == 30
