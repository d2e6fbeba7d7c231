"""What a chain of commands becomes, and what SLURM is told; with programs in place of SLURM's."""

import os
from pathlib import Path

import pytest

from slurm.cli import parse_submit
from slurm.errors import UserError
from slurm.jobs import local
from slurm.jobs.folders import job_folders, read_job
from slurm.submit.chain import Array, Part, Step, split_chain, stages, take_tasks
from tests.data_sets import write_data_set
from tests.unit.slurm.conftest import TOKENIZE, TRAIN, FakeSlurm, run


def test_chains_are_split() -> None:
    assert split_chain(["a", "b", "then", "c"]) == [["a", "b"], ["c"]]
    for words in ([], ["then", "a"], ["a", "then"], ["a", "then", "then", "b"]):
        with pytest.raises(UserError, match="no command"):
            split_chain(words)


def test_tasks_are_submits(tmp_path: Path) -> None:
    assert take_tasks([*TOKENIZE, "--tasks", "8"]) == (TOKENIZE, 8)
    assert take_tasks([*TOKENIZE, "--tasks=8"]) == (TOKENIZE, 8)
    assert take_tasks(["index", "--preset", "x", "--tasks", "8"]) == (["index", "--preset", "x"], 8)
    assert take_tasks(["eval", "run", "--tasks", "perplexity"])[1] is None
    for command, message in {
        (*TOKENIZE, "--tasks", "0"): "give the number of tasks",
        (*TOKENIZE, "--tasks"): "give the number of tasks",
        (*TOKENIZE, "--tasks", "8", "--rank", "1"): "--rank: --tasks gives each task its own",
        (*TOKENIZE, "--tasks", "8", "--world_size=1"): "--world-size: --tasks gives",
        (
            "data",
            "verify",
            "x",
            "--tasks",
            "8",
        ): "only `data tokenize` and `index` are cut into tasks",
    }.items():
        with pytest.raises(UserError, match=message):
            take_tasks(list(command))


def test_arrays_stay_below_the_clusters_limit() -> None:
    steps = [Step(("data", "tokenize"), Path("out"), tasks=10), Step(("export",), Path("model"))]
    arrays, merge, export = stages(steps, max_array_size=4)
    assert [part.array for part in arrays] == [Array(0, 4, 10), Array(4, 4, 10), Array(8, 2, 10)]
    assert merge == [Part(("data", "merge", "out"), Path("out"))]
    assert export == [Part(("export",), Path("model"))]


def test_index_ends_with_itself() -> None:
    command = ("index", "--preset", "debug")
    array, last = stages([Step(command, Path("run"), tasks=2)], max_array_size=4)
    assert array == [Part(command, Path("run"), Array(0, 2, 2))]
    assert last == [Part(command, Path("run"))]


def test_index_files_before_a_training(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    write_data_set(tmp_path / "tokens", vocab_size=400)
    chain = ["index", *TRAIN[1:], "--tasks", "2", "then", *TRAIN]
    output = run(capsys, "submit", "--profile", "p.toml", "--dry-run", *chain)
    array = "pretrain.cli index --preset debug --data.paths tokens --output-dir run"
    assert output.count(array) == 2
    assert "--rank $((0 + SLURM_ARRAY_TASK_ID)) --world-size 2" in output
    for command, message in {
        ("index", *TRAIN[1:3], "--output-dir", "run"): "no data: give --data.paths",
        ("index", *TRAIN[1:-2]): "no --output-dir",
    }.items():
        assert message in run(capsys, "submit", "--profile", "p.toml", *command, status=2)


def test_submits_own_options_end_at_the_command() -> None:
    words = ["--profile", "train", "--dry-run", "--nodes=2", "train", "--nodes", "3"]
    options, commands = parse_submit(words)
    assert (options.profile, options.dry_run, options.nodes) == (Path("train"), True, 2)
    assert commands == [["train", "--nodes", "3"]]


def test_a_chain_is_submitted(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    chain = [*TOKENIZE, "--tasks", "6", "then", *TRAIN, "then", "export", "run", "model"]
    output = run(capsys, "submit", "--profile", "p.toml", "--time", "1:00:00", *chain)
    places = ["tokens-slurm/1", "tokens-slurm/2", "tokens-slurm/3", "run/slurm/1", "model-slurm/1"]
    asked = [["--array=0-3"], ["--array=0-1"]]
    asked += [[f"--dependency=afterok:{ids}"] for ids in ("101:102", "103", "104")]
    for i, (call, place, more) in enumerate(zip(slurm.calls("sbatch"), places, asked, strict=True)):
        folder = tmp_path / place
        log = "log.%a" if i < 2 else "log"
        script = str(folder / "job.sh")
        start = ["--parsable", f"--output={folder}/{log}"]
        assert call == [*start, *more, script]
        job = read_job(folder)
        assert (job.job_id, job.workdir) == (str(101 + i), str(tmp_path))
        assert job.asked["resources"]["time"] == "1:00:00"
        assert (folder / "profile.toml").read_text() == (tmp_path / "p.toml").read_text()
        assert f"job {101 + i}: " in output
    assert read_job(tmp_path / places[2]).command == ["data", "merge", str(tmp_path / "tokens")]
    assert "--rank $((4 + SLURM_ARRAY_TASK_ID))" in (tmp_path / places[1] / "job.sh").read_text()
    # Two at once do not take each other's folder, and a run's folder is still a new run's.
    run(capsys, "submit", "--profile", "p.toml", "--after", "7", *TRAIN)
    assert (tmp_path / "run" / "slurm" / "2" / "job.sh").is_file()


def test_a_dry_run_makes_nothing(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    before = sorted(tmp_path.rglob("*"))
    output = run(capsys, "submit", "--profile", "p.toml", "--dry-run", *TOKENIZE, "then", *TRAIN)
    assert output.count("#!/bin/bash") == 2
    assert "--dependency=afterok:JOB1" in output
    assert sorted(tmp_path.rglob("*")) == before
    assert not slurm.calls("sbatch")


@pytest.mark.parametrize("launcher", ["slurm", "local"])
def test_secrets_are_in_files_for_the_user_alone(
    launcher: str, slurm: FakeSlurm, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "start_chain", lambda _: [1, 0.0])
    text = f'launcher = "{launcher}"\n[environment]\nWANDB_API_KEY = "it\'s s3cret"\n'
    (tmp_path / "p.toml").write_text(text)
    (tmp_path / "p.toml").chmod(0o600)
    before = os.umask(0)
    try:
        printed = run(capsys, "submit", "--profile", "p.toml", "--dry-run", *TOKENIZE)
        printed += run(capsys, "submit", "--profile", "p.toml", *TOKENIZE, "then", *TRAIN)
    finally:
        os.umask(before)
    assert "s3cret" not in printed
    assert "WANDB_API_KEY" in printed  # in a comment
    assert "s3cret" not in str(slurm.calls("sbatch"))
    files = [f for f in tmp_path.rglob("*") if f.is_file() and b"s3cret" in f.read_bytes()]
    of_two_jobs = ["environment", "environment", "p.toml", "profile.toml", "profile.toml"]
    assert sorted(f.name for f in files) == of_two_jobs
    assert {f.stat().st_mode & 0o777 for f in files} == {0o600}
    assert read_job(tmp_path / "run/slurm/1").asked["profile"]["environment"] == ["WANDB_API_KEY"]


def test_an_estimate_submits_nothing(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    """The figures are estimate's, whose test works them out; here, that the options reach it."""
    write_data_set(tmp_path / "tokens", vocab_size=400)
    options = ("--profile", "p.toml", "--nodes", "4", "--ranks-per-node", "8", "--estimate")
    train = ["train", "--preset", "paper-1b", *TRAIN[3:]]

    def said(*more: str) -> str:
        return run(capsys, "submit", *options, *more, *TOKENIZE, "then", *train)

    half, quarter = said("--mfu", "0.5"), said("--mfu", "0.25")
    assert "32 x H100 (MFU 50.0%; an MFU of 50%)" in half
    hours = [float(text.split("Time")[1].split()[0].replace(",", "")) for text in (half, quarter)]
    assert 1.8 < hours[1] / hours[0] < 2
    assert "in 1 job;" in half
    assert " jobs;" in said("--mfu", "0.5", "--time", "01:00:00")
    assert "the planner's model" in said("--device", "h200")
    assert not slurm.calls("sbatch")
    assert not (tmp_path / "run").exists()
    refused = run(capsys, "submit", *options, *TOKENIZE, status=2)
    assert "--estimate needs a `train` command" in refused
    assert "no device 'h101'" in run(
        capsys, "submit", *options, "--device", "h101", *train, status=2
    )


def test_what_sbatch_refuses_is_said_and_taken_back(slurm, tmp_path: Path, capsys) -> None:
    (slurm.folder / "sbatch").write_text(
        (slurm.folder / "sbatch").read_text().replace("n=$(", '[ "$n" ]; n=$(')
    )
    argv = ["submit", "--profile", "p.toml", *TOKENIZE]
    for said, advice in {
        "sbatch: error: invalid partition specified: gpu": "`sinfo -s` lists the partitions",
        "sbatch: error: Invalid account or account/partition combination specified": "lists your accounts",
        "sbatch: error: Batch job submission failed: Requested node configuration is not available": (
            "no node has so many GPUs"
        ),
        "something new": "sbatch refused (something new)",
    }.items():
        (slurm.folder / "REFUSE").write_text(said)
        assert advice in run(capsys, *argv, status=2)
        assert not job_folders(tmp_path / "tokens")
    # The second of a chain: the first goes too.
    (slurm.folder / "REFUSE").unlink()
    sbatch = slurm.folder / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("echo $((", '[ "$n" -gt 5 ] && exit 1; echo $(('))
    output = run(capsys, *argv, "then", "export", "run", "model", status=2)
    assert "sbatch refused (it ended with 1)" in output
    assert slurm.calls("scancel") == [["105"]]
    assert not job_folders(tmp_path / "tokens")


def test_no_slurm_here(slurm: FakeSlurm, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    output = run(capsys, "submit", "--profile", "p.toml", *TOKENIZE, status=2)
    assert "there is no sbatch here" in output


def test_mistakes_are_found_before_anything_is_submitted(slurm, tmp_path, capsys) -> None:
    start = ["submit", "--profile", "p.toml"]
    data = write_data_set(tmp_path / "data")
    train = ["train", "--preset", "debug", "--output-dir", "run", "--data.paths"]
    for argv, message in {
        (*start,): "no command after submit's options",
        (*start, "trian"): "submit trian: submit takes train",
        (*start, "--node", "2", *TRAIN): "--nodes",
        (*start, "--after", "x", *TRAIN): "--after x: give a job's number",
        (*start, *train, "no"): "does not exist",
        (
            *start,
            *train,
            str(data),
            "--nproc-per-node",
            "2",
        ): "--nproc-per-node is not for `submit`",
        (*start, "--nodes", "3", *train, str(data)): "global_batch_size 8 is not a multiple",
        (*start, *TOKENIZE, "then", *TRAIN, "--optimizer.l", "1"): "--optimizer.lr",
        (*start, "--nodes", "3", *TOKENIZE, "then", *TRAIN): "global_batch_size 8",
        (*start, "train", "--preset", "debug"): "no --output-dir",
        (*start, "export", "run", "a\\b"): "has a backslash",
        (*start, "export", "run"): "The folder to make",
        (*start, "data", "tokenize", "--help"): "run `megatron-ladder data --help`",
        ("submit", "--profile", "no.toml", *TRAIN): "--profile no.toml does not exist",
    }.items():
        output = run(capsys, *argv, status=2)
        assert message in " ".join(output.replace("│", " ").split()), argv
        assert not slurm.calls("sbatch"), argv
        assert not (tmp_path / "run").exists(), argv
