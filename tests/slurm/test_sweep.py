"""A sweep on the cluster: its runs are jobs that run at the same time."""

from tests.slurm.conftest import job_ids, log, wait_until
from tests.unit.pretrain.sweep.sweeps import write_sweep


def test_each_run_is_a_job_of_its_own(cluster, submit, profile, tmp_path, capsys) -> None:
    file = write_sweep(tmp_path, "[axes]\nseed = [1, 2]\ntokens = [1280]\n")
    folder = tmp_path / "sweep"
    runs = [folder / f"seed-{seed}_tokens-1280" for seed in (1, 2)]
    words = ["--profile", profile(stand_in={"steps": 10}), "sweep", file, "--output-dir", folder]
    submit(*words)
    ids = [job for run in runs for job in job_ids(run)]
    assert len(set(ids)) == 2

    def trained() -> bool:
        return all((run / "checkpoints" / "step_00000010").is_dir() for run in runs)

    wait_until(trained, 60, lambda: "\n".join(map(log, runs)))
