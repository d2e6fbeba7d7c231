"""Makes jobs of a chain of commands: renders, keeps and submits a script for each."""

import os
import shlex
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from slurm.errors import UserError
from slurm.files import write_atomically, write_privately
from slurm.jobs import client, local
from slurm.jobs.folders import Job, make_folder, next_folder, place_of, write_job
from slurm.submit.chain import Part, Step, stages
from slurm.submit.profile import Profile
from slurm.submit.render import Resources, environment_file, task_script, train_script

ON_A_GPU = ("eval", "generate")  # if there is one; the other commands compute little, or on the CPU


def submit(
    steps: list[Step], profile: Profile, resources: Resources, profile_file: Path, after: str | None
) -> str:
    """Submits a chain; returns a line for each job.

    Raises:
        UserError: SLURM refuses a job (the chain's other jobs are then cancelled), or cannot be asked.
    """
    _check_outputs(steps, profile)
    waiting_for = [after] if after else []
    made: list[tuple[Path, Job]] = []
    try:
        for stage in _stages(steps, profile, resources, after):
            ids = []
            for part in stage:
                folder = make_folder(place_of(part.command, part.output))
                job = _job(part, profile, resources, folder, waiting_for)
                made.append((folder, job))
                write_privately(folder / "profile.toml", profile_file.read_bytes())
                if profile.environment:
                    variables = os.fsencode(environment_file(profile))
                    write_privately(folder / "environment", variables)
                write_atomically(folder / "job.sh", _script(part, profile, resources, folder))
                if profile.launcher == "slurm":
                    job = replace(job, job_id=_sbatch(job.submitted_by))
                    made[-1] = (folder, job)
                    ids.append(str(job.job_id))
                write_job(folder, job)
            waiting_for = ids
        if profile.launcher == "local":
            runner = local.start_chain([folder for folder, _ in made])
            made = [(folder, replace(job, runner=runner)) for folder, job in made]
            for folder, job in made:
                write_job(folder, job)
    except BaseException:
        if ids := [job.job_id for _, job in made if job.job_id]:
            client.call("scancel", *ids)
        for folder, _ in made:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    lines = [f"{_said(job)}   log and script in {folder}" for folder, job in made]
    output = shlex.quote(str(steps[-1].output))
    return "\n".join([*lines, f"Then: megatron-ladder status {output}, logs -f, cancel"])


def dry_run(steps: list[Step], profile: Profile, resources: Resources, after: str | None) -> None:
    """Prints what `submit` would: the scripts, and to stderr the commands that submit them."""
    waiting_for = [after] if after else []
    for number, stage in enumerate(_stages(steps, profile, resources, after), start=1):
        for part in stage:
            folder = next_folder(place_of(part.command, part.output))
            if profile.launcher == "slurm":
                job = _job(part, profile, resources, folder, waiting_for)
                print(shlex.join(job.submitted_by), file=sys.stderr)
            print(_script(part, profile, resources, folder))
        waiting_for = [f"JOB{number}"]


def _check_outputs(steps: list[Step], profile: Profile) -> None:
    for step in steps:
        if profile.launcher == "slurm" and "\\" in str(step.output):
            raise UserError(
                f"{step.output}: sbatch cannot write a log where a path has a backslash"
            )


def _stages(
    steps: list[Step], profile: Profile, resources: Resources, after: str | None
) -> list[list[Part]]:
    if profile.launcher == "slurm":
        in_tasks = any(step.tasks is not None for step in steps)
        return stages(steps, client.max_array_size() if in_tasks else 1)
    if resources.nodes > 1 or resources.spare_nodes or after or resources.time:
        raise UserError(
            '--nodes, --spare-nodes, --time and --after need SLURM: the profile has launcher = "local"'
        )
    # One process of `data tokenize` or `index` uses all cores and joins the parts.
    return stages([replace(step, tasks=None) for step in steps], 1)


def _script(part: Part, profile: Profile, resources: Resources, folder: Path) -> str:
    command = list(part.command)
    if command[0] == "train":
        return train_script(profile, resources, command[1:], part.output, folder)
    gpus = min(profile.gpus_per_node, 1 if command[0] in ON_A_GPU else 0)
    return task_script(
        profile, resources.time, command, part.output, folder, gpus=gpus, array=part.array
    )


def _job(
    part: Part, profile: Profile, resources: Resources, folder: Path, waiting_for: list[str]
) -> Job:
    log = "log.%a" if part.array else "log"
    # sbatch reads %j in --output as the job's number, and drops backslashes.
    argv = ["sbatch", "--parsable", f"--output={str(folder).replace('%', '%%')}/{log}"]
    # Not in the script: sbatch reads quotes and backslashes of its lines its own way.
    if profile.comment:
        argv.append(f"--comment={profile.comment}")
    if part.array:
        argv.append(f"--array=0-{part.array.count - 1}")
    if waiting_for:
        argv.append(f"--dependency=afterok:{':'.join(waiting_for)}")
    return Job(
        command=list(part.command),
        workdir=str(Path.cwd()),
        launcher=profile.launcher,
        # The values of variables may be secret.
        asked={
            "profile": asdict(profile) | {"environment": list(profile.environment)},
            "resources": asdict(resources),
        },
        submitted_by=[*argv, str(folder / "job.sh")] if profile.launcher == "slurm" else [],
        unix_time=time.time(),
        after=waiting_for,
    )


def _sbatch(argv: list[str]) -> str:
    """The new job's id."""
    # Where there are several clusters, `;CLUSTER` follows the id.
    return client.call(*argv).strip().partition(";")[0]


def _said(job: Job) -> str:
    what = " ".join(job.command[:2] if job.command[0] == "data" else job.command[:1])
    after = f" after {', '.join(job.after)}" if job.after else ""
    return f"job {job.job_id}: {what}{after}" if job.job_id else f"in the background: {what}"
