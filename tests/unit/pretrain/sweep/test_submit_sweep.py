"""`submit ... sweep FILE`: a job of each run that is neither done nor in the queue."""

import sys
from pathlib import Path

import pytest

from pretrain import cli
from slurm.jobs import client
from slurm.jobs.client import Facts
from slurm.jobs.folders import Job, write_job
from tests.unit.pretrain.sweep.sweeps import write_sweep

AXES = "[axes]\nseed = [1, 2, 3]\ntokens = [1280]\n"


def profile(folder: Path, launcher: str) -> list[str]:
    file = folder / f"{launcher}.toml"
    file.write_text(f'launcher = "{launcher}"\npython = "{sys.executable}"\n')
    return ["--profile", str(file)]


@pytest.mark.parametrize("launcher", ["slurm", "local"])
def test_each_run_is_a_job(tmp_path: Path, launcher: str, capsys) -> None:
    file, folder = write_sweep(tmp_path, AXES), tmp_path / "runs"
    sweep = ["sweep", str(file), "--output-dir", str(folder)]
    assert cli.main(["submit", *profile(tmp_path, launcher), "--dry-run", *sweep]) == 0
    said = capsys.readouterr()
    for seed in (1, 2, 3):
        name = f"seed-{seed}_tokens-1280"
        assert f"--config {folder}/configs/{name}.json --output-dir {folder}/{name}" in said.out
        if launcher == "slurm":
            assert f"{folder}/{name}/slurm/1/job.sh" in said.err
    assert "3 runs: 0 are done, 0 in the queue" in said.err
    assert "--dependency" not in said.err  # they may all run at the same time
    assert not folder.exists()


def test_what_is_in_the_queue_is_not_submitted_again(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = write_sweep(tmp_path, AXES), tmp_path / "runs"
    states = {"7": "PENDING", "8": "FAILED"}
    for seed, number in ((1, "7"), (2, "8")):
        job = folder / f"seed-{seed}_tokens-1280" / "slurm" / "1"
        job.mkdir(parents=True)
        write_job(job, Job(["train"], "/", "slurm", {}, [], 0.0, [], job_id=number))
    # Nor is it checked: another process may be training in it.
    (folder / "seed-1_tokens-1280" / "config.json").write_text("{")

    def job_facts(ids: list[str]) -> dict[str, list[Facts]]:
        return {number: [Facts(states[number])] for number in ids}

    monkeypatch.setattr(client, "job_facts", job_facts)
    argv = ["submit", *profile(tmp_path, "slurm"), "--dry-run"]
    argv += ["sweep", str(file), "--output-dir", str(folder)]
    assert cli.main(argv) == 0
    said = capsys.readouterr()
    assert "3 runs: 0 are done, 1 in the queue" in said.err
    assert "configs/seed-1_" not in said.out
    assert "configs/seed-2_" in said.out and "configs/seed-3_" in said.out


def test_an_estimate_of_each_run(tmp_path: Path, capsys) -> None:
    file, folder = write_sweep(tmp_path, AXES), tmp_path / "runs"
    argv = ["submit", *profile(tmp_path, "local"), "--estimate", "--mfu", "0.1"]
    assert cli.main([*argv, "sweep", str(file), "--output-dir", str(folder)]) == 0
    assert capsys.readouterr().out.count("1,280 tokens in 10 steps") == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["then", "report", "runs"], "a sweep makes a job of each run, so no command of a chain"),
        (["--dry-run"], "--dry-run of `sweep` trains nothing: give submit's own"),
    ],
)
def test_what_does_not_go(tmp_path: Path, capsys, more: list[str], message: str) -> None:
    file = write_sweep(tmp_path, AXES)
    argv = ["submit", *profile(tmp_path, "slurm"), "sweep", str(file), "--output-dir", "runs"]
    assert cli.main([*argv, *more]) == 2
    assert message in capsys.readouterr().err
