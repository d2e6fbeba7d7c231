"""`| head`: a command whose reader has gone ends, silently; a training with a checkpoint."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slurm.jobs.folders import Job, write_job
from tests.data_sets import write_data_set

ROOT = Path(__file__).parents[2]
SIGPIPE = 141  # what a shell sees of `yes | head`


def environment() -> dict[str, str]:
    """With Python's buffers: what they hold is written when the interpreter ends."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**kept, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def without_reader(argv: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """The command, writing to a pipe that nobody has open to read."""
    read, write = os.pipe()
    os.close(read)
    options = {"stderr": subprocess.PIPE, **options}
    try:
        return subprocess.run(
            [sys.executable, "-m", *argv],
            stdout=write,
            text=True,
            env=environment(),
            timeout=300,
            **options,
        )
    finally:
        os.close(write)


def head(pipeline: str) -> subprocess.CompletedProcess[str]:
    """A command and what reads its output, in a shell; the exit status is the command's."""
    pipeline = f'{sys.executable} -m pretrain.cli {pipeline}; exit "${{PIPESTATUS[0]}}"'
    return subprocess.run(
        ["/bin/bash", "-c", pipeline],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["pretrain.cli"],
        ["pretrain.cli", "train", "--help"],
        ["pretrain.cli", "data", "--help"],
        ["pretrain.cli", "submit", "--help"],
        ["data_prep", "clean", "--help"],
        ["pretrain", "--help"],
    ],
    ids=" ".join,
)
def test_help_without_a_reader_ends_silently(argv: list[str]) -> None:
    ended = without_reader(argv)
    assert (ended.returncode, ended.stderr) == (SIGPIPE, "")


def test_a_mistake_that_nobody_reads_of_is_none_of_the_output(tmp_path: Path) -> None:
    """Its line goes to stderr, which has its reader."""
    ended = without_reader(["pretrain.cli", "logs", str(tmp_path)])
    assert ended.returncode == 2
    assert ended.stderr.startswith("megatron-ladder logs: ")
    ended = without_reader(["pretrain.cli", "logs", str(tmp_path)], stderr=subprocess.STDOUT)
    assert ended.returncode == SIGPIPE


@pytest.mark.parametrize("both", ["", "2>&1"])
def test_head_of_a_long_log(tmp_path: Path, both: str) -> None:
    """More than a pipe holds: writing fails in the middle of the command."""
    folder = tmp_path / "run" / "slurm" / "1"
    folder.mkdir(parents=True)
    write_job(folder, Job(["train"], str(tmp_path), "local", {}, [], 0.0, []))
    (folder / "log").write_text("".join(f"line {i}\n" for i in range(300_000)))
    ended = head(f"logs {tmp_path / 'run'} {both} | head -n 2")
    assert (ended.returncode, ended.stdout, ended.stderr) == (SIGPIPE, "line 0\nline 1\n", "")


@pytest.mark.parametrize("both", ["", "2>&1"])
def test_a_training_saves_and_stops(tmp_path: Path, both: str) -> None:
    data, run = write_data_set(tmp_path / "data"), tmp_path / "run"
    options = f"--preset debug --schedule.train-steps 2000 --data.paths {data} --output-dir {run}"
    ended = head(f"train {options} {both} | grep -m 1 loss")
    assert ended.returncode == 75
    assert ended.stdout.startswith("step    1/2000 | loss ") and ended.stdout.count("\n") == 1
    assert "Traceback" not in ended.stderr
    (saved,) = (run / "checkpoints").iterdir()
    assert 1 < int(saved.name.removeprefix("step_")) < 100


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_were_closed_before_are_none_of_its_pipes(closed: str) -> None:
    ended = head(f"{closed} </dev/null | cat")
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(("unread", "status"), [("stdout", 0), ("stderr", SIGPIPE)])
def test_a_rank_has_done_its_work_when_its_output_is_not_read(unread: str, status: int) -> None:
    """torchrun and SLURM would take 0 of a rank that was cut off for a finished run."""
    code = (
        "import sys\n"
        "from data_prep.broken_pipe import run\n"
        f"sys.exit(run(lambda: print('a line', file=sys.{unread}, flush=True)))\n"
    )
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment(), "RANK": "0"},
        timeout=60,
        **{unread: write},  # type: ignore[call-overload]
    )
    os.close(write)
    assert ended.returncode == status


def test_another_broken_pipe_stays_an_error() -> None:
    code = (
        "import os\n"
        "from data_prep.broken_pipe import run\n"
        "read, write = os.pipe()\n"
        "os.close(read)\n"
        "run(lambda: os.write(write, b'x'))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("BrokenPipeError: [Errno 32] Broken pipe")
