"""What a chain of commands becomes, and what SLURM is told; with programs in place of SLURM's."""

import json
from pathlib import Path

import pytest

from pretrain import cli
from slurm.cli import parse_submit
from slurm.errors import UserError
from slurm.jobs.folders import job_folders, log_files, read_job
from slurm.submit.chain import Array, Part, Step, split_chain, stages, take_tasks
from slurm.watch.history import read_history
from tests.data_sets import write_data_set

FAKE = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" >> CALLS; printf '\\n' >> CALLS
case ${0##*/} in
sbatch) [ -f REFUSE ] && { cat REFUSE >&2; exit 1; }; n=$(grep -ac ^sbatch CALLS); echo $((100 + n)) ;;
squeue) [ -f SQUEUE ] || exit 1; cat SQUEUE ;;
scontrol) echo "MaxArraySize            = 4" ;;
sacct) exit 1 ;;
esac
"""


class FakeSlurm:
    """Programs that note how they are called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = FAKE
        for name in ("CALLS", "REFUSE", "SQUEUE"):
            text = text.replace(name, str(folder / name))
        for name in ("sbatch", "squeue", "scontrol", "scancel", "sacct"):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        file = self.folder / "CALLS"
        lines = file.read_text().split("\0\n") if file.exists() else []
        return [words[1:] for words in (line.split("\0") for line in lines) if words[0] == name]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "p.toml").write_text('partition = "cpu"\n')
    monkeypatch.chdir(tmp_path)
    return FakeSlurm(tmp_path / "bin")


def run(capsys, *argv: str, status: int = 0) -> str:
    try:
        ended: object = cli.main(list(argv))
    except SystemExit as error:
        ended = error.code
    output = capsys.readouterr()
    assert ended == status, output.err
    return output.out + output.err


TOKENIZE = ["data", "tokenize", "text", "--tokenizer", "t.model", "--output-dir", "tokens"]
TRAIN = ["train", "--preset", "debug", "--data.paths", "tokens", "--output-dir", "run"]


def test_chains_are_split() -> None:
    assert split_chain(["a", "b", "then", "c"]) == [["a", "b"], ["c"]]
    for words in ([], ["then", "a"], ["a", "then"], ["a", "then", "then", "b"]):
        with pytest.raises(UserError, match="no command"):
            split_chain(words)


def test_tasks_are_submits(tmp_path: Path) -> None:
    assert take_tasks([*TOKENIZE, "--tasks", "8"]) == (TOKENIZE, 8)
    assert take_tasks([*TOKENIZE, "--tasks=8"]) == (TOKENIZE, 8)
    assert take_tasks(["eval", "run", "--tasks", "perplexity"])[1] is None
    for command, message in {
        (*TOKENIZE, "--tasks", "0"): "give the number of tasks",
        (*TOKENIZE, "--tasks"): "give the number of tasks",
        (*TOKENIZE, "--tasks", "8", "--rank", "1"): "--rank: --tasks gives each task its own",
        (*TOKENIZE, "--tasks", "8", "--world_size=1"): "--world-size: --tasks gives",
        ("data", "verify", "x", "--tasks", "8"): "only `data tokenize`",
    }.items():
        with pytest.raises(UserError, match=message):
            take_tasks(list(command))


def test_arrays_stay_below_the_clusters_limit() -> None:
    steps = [Step(("data", "tokenize"), Path("out"), tasks=10), Step(("export",), Path("model"))]
    arrays, merge, export = stages(steps, max_array_size=4)
    assert [part.array for part in arrays] == [Array(0, 4, 10), Array(4, 4, 10), Array(8, 2, 10)]
    assert merge == [Part(("data", "merge", "out"), Path("out"))]
    assert export == [Part(("export",), Path("model"))]


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
    assert "no `train` among the commands" in refused
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
        (*start, *train, str(data), "--nproc-per-node", "2"): "--nproc-per-node is a machine's",
        (*start, "--nodes", "3", *train, str(data)): "global_batch_size 8 is not a multiple",
        (*start, *TOKENIZE, "then", *TRAIN, "--optimizer.l", "1"): "--optimizer.lr",
        (*start, "--nodes", "3", *TOKENIZE, "then", *TRAIN): "global_batch_size 8",
        (*start, "train", "--preset", "debug"): "no --output-dir",
        (*start, "export", "run", "a\\b"): "has a backslash",
        (*start, "export", "run"): "The folder to make",
        (*start, "data", "tokenize", "--help"): "is for `megatron-ladder data --help`",
        ("submit", "--profile", "no.toml", *TRAIN): "--profile no.toml does not exist",
    }.items():
        output = run(capsys, *argv, status=2)
        assert message in " ".join(output.replace("│", " ").split()), argv
        assert not slurm.calls("sbatch"), argv
        assert not (tmp_path / "run").exists(), argv


STATUS = {
    "state": "training", "step": 1200, "train_steps": 25000, "tokens": 1, "loss": 2.31,
    "tokens_per_second": 1.2e6, "eta_s": 12000.0, "last_checkpoint": 1000, "starts": 3, "reason": "",
    "unix_time": 1.0, "host": "n", "pid": 1, "world_size": 2, "job_id": "101",
}  # fmt: skip


def test_status_of_a_run(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    run_dir = tmp_path / "run"
    run(capsys, "submit", "--profile", "p.toml", "--after", "7", *TRAIN)
    (run_dir / "status.json").write_text(json.dumps(STATUS))
    (slurm.folder / "SQUEUE").write_text(
        "101|RUNNING|None|1:02|1:00:00|node[0-1]\n9|RUNNING|||||\n"
    )
    text = run(capsys, "status", "run")
    for part in (
        f"{run_dir}: training, step 1,200 of 25,000 (4.8%), loss 2.3100",
        "1,200,000 tokens/s, 3 h 20 min to go",
        "last checkpoint: step 1,000; restarts: 2",
        "train, job 101",
        "RUNNING on node[0-1], 1:02 of 1:00:00",
    ):
        assert part in text
    # Killed: it could not say so.
    (slurm.folder / "SQUEUE").write_text("101|NODE_FAIL|NodeDown|1:02|1:00:00|node[0-1]\n")
    text = run(capsys, "status", "run")
    assert "not running; when last heard of: training, step 1,200" in text
    assert "NODE_FAIL, a node went down" in text
    (slurm.folder / "SQUEUE").write_text("")
    assert "forgotten by SLURM: it is over" in run(capsys, "status", "run")
    (slurm.folder / "SQUEUE").unlink()  # squeue fails: another machine, or SLURM is down
    assert "SLURM cannot be asked here" in run(capsys, "status", "run")
    (run_dir / "status.json").write_text(
        json.dumps({**STATUS, "state": "failed", "reason": "no space"})
    )
    assert "why it stopped: no space" in run(capsys, "status", "run")
    (run_dir / "status.json").write_text("{")
    assert "train, job 101" in run(capsys, "status", "run")


def test_status_of_what_never_runs_and_of_arrays(slurm: FakeSlurm, capsys) -> None:
    chain = [*TOKENIZE, "--tasks", "3", "then", *TRAIN]
    run(capsys, "submit", "--profile", "p.toml", *chain)
    lines = ["101|COMPLETED|||||"] * 2 + ["101|FAILED|NonZeroExitCode||||"]
    lines += [f"{i}|PENDING|DependencyNeverSatisfied||||" for i in (102, 103)]
    (slurm.folder / "SQUEUE").write_text("\n".join(lines) + "\n")
    text = run(capsys, "status", "tokens", "run", "nothing")
    assert "data tokenize, job 101" in text
    assert "2 COMPLETED, 1 FAILED" in text
    assert text.count("never ran: a job it waited for failed") == 2
    assert "nothing: does not exist" in text


def test_cancel(slurm: FakeSlurm, capsys) -> None:
    assert "nothing was submitted" in run(capsys, "cancel", "run", status=2)
    run(capsys, "submit", "--profile", "p.toml", "--after", "7", *TRAIN)
    squeue = slurm.folder / "SQUEUE"
    for state, argv, call in (
        ("RUNNING", ["run"], ["--batch", "--signal=USR2", "101"]),
        ("RUNNING", ["run", "--now"], ["101"]),
        ("PENDING", ["run"], ["101"]),
    ):
        squeue.write_text(f"101|{state}|||||\n")
        run(capsys, "cancel", *argv)
        assert slurm.calls("scancel")[-1] == call
    squeue.write_text("101|COMPLETED|||||\n")
    assert "no job is queued or runs" in run(capsys, "cancel", "run")


def test_logs(slurm: FakeSlurm, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.watch.logs.ASK_S", 0.5)
    run(capsys, "submit", "--profile", "p.toml", *TOKENIZE, "--tasks", "11")
    assert "no log yet" in run(capsys, "logs", "tokens")
    folder = tmp_path / "tokens-slurm" / "1"
    for task in (10, 9):
        (folder / f"log.{task}").write_text(f"task {task}\n")
    assert [f.name for f in log_files(folder)] == ["log.9", "log.10"]
    text = run(capsys, "logs", "tokens")
    assert text.index("task 9\n") < text.index("task 10\n")
    (slurm.folder / "SQUEUE").write_text("101|COMPLETED|||||\n")
    long = "".join(f"line {i}\n" for i in range(100))
    (folder / "log.9").write_text(long)
    monkey = run(capsys, "logs", "-f", "tokens")  # ends, as the job is over
    assert "line 99\n" in monkey
    assert "line 79\n" not in monkey


def test_histories_in_words(tmp_path: Path) -> None:
    for lines, last in {
        ("start 1 none on a b",): "",
        (
            "start 1 none on a",
            "end 75 00000012 limit",
        ): "stopped in good order before the time limit",
        ("start 1 none on a", "end 137 none "): "a rank was ended by SIGKILL",
        ("start 1 none on a", "end 1 none"): "a rank ended with status 1",
        ("end 1 none", "stop gave up: 3 restarts"): "gave up: 3 restarts",
        (
            "end 1 none fewer than 2 nodes of the job are left",
        ): "fewer than 2 nodes of the job are left",
        (): "",
    }.items():
        (tmp_path / "history").write_text(
            "".join(f"2026-01-01T00:00:00 {line}\n" for line in lines)
        )
        assert read_history(tmp_path).last == last
