"""The commands themselves on a real cluster: data array, merge, training over nodes, export, as one chain.

A training that is stopped before its time limit and goes on computes what an undisturbed one does.
"""

import json
from pathlib import Path

import pytest

from data_prep import cli as data_cli
from pretrain import cli
from slurm.jobs.folders import job_folders, read_job
from tests.slurm.conftest import job_ids, log, wait_until

STEPS = 150


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of text and a tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(6):
        lines = [
            json.dumps({"text": f"def f{j}(x):\n    return x ** {j % 7 + i}\n"}) for j in range(60)
        ]
        (folder / f"{i}.jsonl").write_text("\n".join(lines) + "\n")
    argv = [
        "train-tokenizer",
        str(folder),
        "--vocab-size",
        "300",
        "--output-dir",
        str(folder / "t"),
    ]
    assert data_cli.main(argv) == 0
    return folder


def train(data: Path, run: Path) -> list[object]:
    options = {"--schedule.train-steps": STEPS, "--save-interval": 50, "--eval-interval": 0}
    words = [word for pair in options.items() for word in pair]
    start = ["train", "--preset", "debug", "--micro-batch-size", 1, *words]
    return [*start, "--data.paths", data, "--output-dir", run]


def losses(run: Path) -> dict[int, float]:
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def all_over(cluster, jobs: list[str]) -> bool:
    lines = cluster.call("squeue", "-h", "-t", "all", "-j", ",".join(jobs), "-o", "%T").split()
    return not {"PENDING", "RUNNING", "COMPLETING"} & set(lines)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the chain's results are: other tests compare with its run."""
    return tmp_path_factory.mktemp("chain")


def test_a_chain_from_text_to_a_model(
    cluster, submit, profile, said, capsys, text: Path, place: Path
) -> None:
    data, run, model = place / "data", place / "run", place / "model"
    tokenize = ["data", "tokenize", text, "--tokenizer", text / "t" / "tokenizer.model"]
    tokenize += ["--validation-fraction", 0.1, "--output-dir", data]
    chain = [*tokenize, "--tasks", 6, "then", *train(data, run), "then", "export", run, model]
    options = ["--profile", profile(), "--nodes", 2, "--time", "0:10:00"]
    output = submit(*options, *chain)
    # Two arrays (six tasks, the cluster's limit is 4), the merge, the training, the export.
    one, two, merge = job_ids(data)
    assert f"job {merge}: data merge after {one}, {two}" in output
    assert read_job(job_folders(run)[0]).after == [merge]
    assert read_job(job_folders(model)[0]).after == job_ids(run)
    assert "PENDING, waits for the job before it" in said(run)
    jobs = [*job_ids(data), *job_ids(run), *job_ids(model)]

    def explain() -> str:
        return said(data, run, model) + log(data) + log(run) + log(model)

    wait_until(lambda: len(losses(run)) > 5, 120, explain)
    assert "RUNNING on node" in said(run)
    assert cli.main(["logs", "-f", str(run)]) == 0  # until it is over
    assert f"saved checkpoint of step {STEPS}" in capsys.readouterr().out
    wait_until(lambda: all_over(cluster, jobs), 120, explain)
    assert said(data, run, model).count("COMPLETED") == 5  # an array is counted by its tasks
    assert (data / "manifest.json").is_file()
    assert (model / "model.safetensors").is_file()
    assert len(losses(run)) == STEPS
    assert "Resuming" not in log(run)


@pytest.mark.slow
def test_stopped_before_its_time_limit_it_computes_the_same(
    cluster, submit, profile, said, place: Path, tmp_path: Path
) -> None:
    if not (place / "run" / "metrics.jsonl").exists():
        pytest.skip("compares with the run of the test before: run the whole file")
    run = tmp_path / "run"
    submit("--profile", profile(), "--nodes", 2, *train(place / "data", run))
    job = job_ids(run)[0]

    def explain() -> str:
        return said(run) + log(run)

    wait_until(lambda: len(losses(run)) > 20, 120, explain)
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # as SLURM does at --signal's time
    wait_until(lambda: "end 75" in (job_folders(run)[0] / "history").read_text(), 60, explain)
    stopped_at = max(losses(run))
    assert 20 < stopped_at < STEPS
    wait_until(lambda: all_over(cluster, [job]), 120, explain)
    assert losses(run) == losses(place / "run")  # bitwise: JSON has all digits
    assert f"Resuming {run} from step {stopped_at}" in log(run)
    assert "started 2 times; last: finished" in said(run)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["scancel", "requeue", "preemption", "dead node"])
def test_ended_from_outside_it_computes_the_same(
    cluster, submit, profile, said, place: Path, tmp_path: Path, how: str
) -> None:
    if not (place / "run" / "metrics.jsonl").exists():
        pytest.skip("compares with the run of the first test: run the whole file")
    run = tmp_path / "run"
    words = ["--profile", profile(), "--nodes", 2, *train(place / "data", run)]
    submit(*words)

    def explain() -> str:
        return said(run) + log(run)

    wait_until(lambda: len(losses(run)) > 60, 120, explain)
    assert len(losses(run)) < STEPS - 10
    job = job_ids(run)[0]
    if how == "scancel":
        cluster.call("scancel", job)
        wait_until(lambda: all_over(cluster, [job]), 60, explain)
        stopped_at = max(losses(run))
        submit(*words)
    elif how == "requeue":
        cluster.call("scontrol", "requeue", job)
    elif how == "preemption":
        urgent = ["--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null"]
        cluster.call("sbatch", *urgent, "--wrap=true")
    else:
        cluster.crash(1)
    wait_until(lambda: "Resuming" in log(run), 120, explain)
    if how == "dead node":  # which could not save
        assert f"Resuming {run} from step 50" in log(run)
    else:
        from_step = int(log(run).partition(f"Resuming {run} from step ")[2].split()[0])
        assert from_step > 60
        if how == "scancel":
            assert from_step == stopped_at
    wait_until(lambda: all_over(cluster, job_ids(run)), 120, explain)
    assert losses(run) == losses(place / "run")  # bitwise
    assert said(run).count("COMPLETED") == 1


@pytest.mark.slow
def test_four_nodes_train_as_two_do(
    cluster, submit, profile, said, place: Path, tmp_path: Path
) -> None:
    if not (place / "run" / "metrics.jsonl").exists():
        pytest.skip("compares with the run of the first test: run the whole file")
    run = tmp_path / "run"
    submit("--profile", profile(), "--nodes", 4, *train(place / "data", run))
    wait_until(lambda: all_over(cluster, job_ids(run)), 200, lambda: said(run) + log(run))
    two = losses(place / "run")
    assert len(losses(run)) == STEPS
    assert all(abs(loss - two[step]) < 1e-3 for step, loss in losses(run).items())
    assert read_job(job_folders(run)[0]).asked["resources"]["nodes"] == 4
