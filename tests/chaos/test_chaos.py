"""Trainings under random faults: they end by themselves, lose little, and compute the same."""

from pathlib import Path

import pytest

from tests.chaos.run import Options, chaos, table
from tests.slurm.cluster import missing


def test_a_few_faults_on_this_machine(tmp_path: Path) -> None:
    kinds = ("a bit flipped, SIGKILL", "NaN", "disk full", "a rank fails by itself")
    results = chaos(Options(faults=4, steps=30, launcher="local", kinds=kinds), tmp_path)
    assert len(results["faults"]) == 4
    print(table(results))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thirty_faults_on_a_cluster(tmp_path: Path) -> None:
    if why := missing():
        pytest.skip(why)
    results = chaos(Options(), tmp_path)
    print(table(results))
    assert len(results["faults"]) == 30
