"""A job's folder from a stranger: SLURM's commands get no options out of it."""

import json
from pathlib import Path

import pytest

from slurm.errors import UserError
from slurm.jobs.folders import read_job
from slurm.submit.profile import load_profile
from slurm.watch.history import read_history
from slurm.watch.status import status

JOB = {
    "command": ["train"],
    "workdir": "/",
    "launcher": "slurm",
    "asked": {},
    "submitted_by": ["sbatch"],
    "unix_time": 1.0,
    "after": [],
    "job_id": "17",
}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"job_id": "--me"}, "job_id is '--me'"),  # `scancel --me` ends all of a user's jobs
        ({"command": []}, r"command is \[\]"),
        ({"command": "train"}, "command is 'train'"),
        ({"command": ["\ud800"]}, r"command is \['.ud800'\]"),
        ({"unix_time": "x"}, "unix_time is 'x'"),
        ({"unix_time": float("nan")}, "unix_time is nan"),
        ({"runner": [-1, 0]}, r"runner is \[-1, 0\]"),
        ({"colour": 1}, "see its field 'colour'"),
    ],
)
def test_jobs_that_nobody_submitted(fields, said: str, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps(JOB))
    assert read_job(tmp_path).job_id == "17"
    (tmp_path / "job.json").write_text(json.dumps(JOB | fields))
    with pytest.raises(UserError, match=said):
        read_job(tmp_path)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"1" * 5000, b"\xff", b"[]", b" " * ((16 << 20) + 1)]
)
def test_text_that_is_no_job(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_bytes(text)
    with pytest.raises(UserError, match=r"job\.json cannot be read"):
        read_job(tmp_path)


@pytest.mark.parametrize("text", [b"a=" + b"[" * 50_000, b"nodes=" + b"1" * 5000, b"\xff\xfea"])
def test_text_that_is_no_profile(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_bytes(text)
    with pytest.raises(UserError, match="is not TOML"):
        load_profile(tmp_path / "p.toml")


def test_a_status_with_other_types_is_left_out(tmp_path: Path) -> None:
    said = {"state": "training", "step": "x", "loss": [], "unix_time": "now", "reason": "\x1b[2J"}
    (tmp_path / "status.json").write_text(json.dumps(said))
    assert status([tmp_path]).startswith(f"{tmp_path}: training, step 0\n")
    (tmp_path / "history").write_text("T end x y z\n")
    assert read_history(tmp_path).last == ""
