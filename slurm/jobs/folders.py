"""A job's folder: RUN/slurm/1 for a training, OUTPUT-slurm/1 for any other command, as that one's output
folder must not exist before it runs.

    job.sh          the script, as submitted
    profile.toml    the profile, as it was (for the user alone)
    environment     the profile's variables, read by the job (for the user alone)
    job.json        the command and what was asked for, resolved; the job's id
    log, log.7      what the job, or task 7 of an array, wrote
    history         the starts and ends of a training
    ends/0.1/       what ranks have left that failed in start 1, before the job was queued again (0 times)
    pid, exit       with launcher "local": the running script, its exit status
"""

import json
import reprlib
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from slurm.errors import UserError
from slurm.files import read_json, write_atomically


@dataclass(frozen=True)
class Job:
    """What job.json says."""

    command: list[str]
    """After `megatron-ladder`."""
    workdir: str
    launcher: str
    asked: dict[str, Any]
    """The profile and the resources, resolved."""
    submitted_by: list[str]
    """sbatch and its options."""
    unix_time: float
    after: list[str]
    """Ids of the jobs that must have succeeded."""
    job_id: str | None = None
    runner: list[float] | None = None
    """With launcher "local": the process that runs the chain, and when it was made."""


def place_of(command: list[str] | tuple[str, ...], output: Path) -> Path:
    """The folder that holds the job folders of an output."""
    if command[0] == "train":
        return output / "slurm"
    return output.with_name(output.name + "-slurm")


def next_folder(place: Path) -> Path:
    return place / str(max((int(f.name) for f in _numbered(place)), default=0) + 1)


def make_folder(place: Path) -> Path:
    """Makes a new job's folder. Two that submit at the same time get two folders."""
    while True:
        folder = next_folder(place)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue


def write_job(folder: Path, job: Job) -> None:
    write_atomically(folder / "job.json", json.dumps(asdict(job), indent=2) + "\n")


def read_job(folder: Path) -> Job:
    try:
        values = read_json(folder / "job.json")
    except (OSError, UserError) as error:
        raise UserError(f"{folder}/job.json cannot be read: {error}") from None
    known = {field.name: field for field in fields(Job)}
    needed = {name for name, field in known.items() if field.default is MISSING}
    if wrong := sorted(values.keys() - known.keys() | needed - values.keys()):
        raise UserError(
            f"{folder}/job.json is not of a submitted job: see its field {reprlib.repr(wrong[0])}"
        )
    job = Job(**values)
    if name := _wrong(job):
        value = reprlib.repr(getattr(job, name))
        raise UserError(f"{folder}/job.json is not of a submitted job: {name} is {value}")
    return job


def _wrong(job: Job) -> str | None:
    """A field whose value no submitted job has. SLURM's own commands get the id as an argument."""
    words = {"command": job.command, "submitted_by": job.submitted_by, "after": job.after}
    for name, value in words.items():
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            return name
    right = {
        # Its first words are printed, and are names of ours.
        "command": bool(job.command)
        and all(word.isprintable() for word in job.command[:1])
        and (job.command[0] != "data" or all(word.isprintable() for word in job.command[:2])),
        "workdir": isinstance(job.workdir, str),
        "launcher": job.launcher in ("slurm", "local"),
        "asked": isinstance(job.asked, dict),
        "unix_time": _is_number(job.unix_time),
        "job_id": job.job_id is None or _is_job_id(job.job_id),
        "runner": job.runner is None
        or (
            isinstance(job.runner, list)
            and len(job.runner) == 2
            and all(map(_is_number, job.runner))
            and 0 < job.runner[0] < 1 << 31
        ),
    }
    return next((name for name, is_right in right.items() if not is_right), None)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e15 < value < 1e15  # NaN is neither


def _is_job_id(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20


def job_folders(output: Path) -> list[Path]:
    """The folders of an output's jobs, oldest first, without those whose submission was cut off."""
    places = (output.with_name(output.name + "-slurm"), output / "slurm")
    found = [folder for place in places for folder in _numbered(place)]
    found = [folder for folder in found if (folder / "job.json").is_file()]
    return sorted(found, key=lambda folder: read_job(folder).unix_time)


def need_jobs(output: Path) -> list[Path]:
    """The same. Raises UserError when there is none."""
    folders = job_folders(output)
    if not folders:
        raise UserError(
            f"{output}: nothing was submitted for it: give the output folder of a submitted command"
        )
    return folders


def log_files(folder: Path) -> list[Path]:
    """A job's log, or those of an array's tasks in order."""
    found = [f for f in folder.glob("log*") if f.is_file() and f.name.isascii()]
    files = [f for f in found if f.name == "log" or f.name[4:].isdigit()]
    return sorted(files, key=lambda f: int(f.name[4:] or -1))


def _numbered(place: Path) -> list[Path]:
    folders = [f for f in place.glob("*") if f.name.isascii() and f.name.isdigit()]
    return sorted(folders, key=lambda f: int(f.name))
