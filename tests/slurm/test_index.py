"""Index files as a job array on the cluster."""

import pytest

from tests.data_sets import write_data_set
from tests.slurm.conftest import job_ids, log, wait_until


@pytest.mark.slow
def test_tasks_share_the_parts_and_a_last_job_makes_the_rest(
    cluster, submit, profile, tmp_path, said
) -> None:
    sets = [write_data_set(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    run = tmp_path / "run"
    options = ["--preset", "debug", "--data.paths", *sets, "--output-dir", run]
    submit("--profile", profile(), "index", *options, "--tasks", 2)
    ids = job_ids(run)
    assert len(ids) == 2

    def is_over() -> bool:
        states = cluster.call("squeue", "-h", "-r", "-t", "all", "-o", "%F %T").splitlines()
        ours = [line.split()[1] for line in states if line.split()[0] in ids]
        return len(ours) == 3 and set(ours) == {"COMPLETED"}

    wait_until(is_over, 200, lambda: f"{log(run)}\n{cluster.call('squeue', '-r', '-t', 'all')}")
    text = log(run)
    assert "The share of task 0 of 2 is made" in text and "The share of task 1 of 2 is made" in text
    assert f"Index files: {run}/dataset_cache, made in" in text
    assert (run / "dataset_cache/made.json").is_file()
    assert not list(run.glob(".dataset_cache*"))
    assert "2 COMPLETED" in said(run)
    assert f"index, job {ids[1]}" in said(run)
