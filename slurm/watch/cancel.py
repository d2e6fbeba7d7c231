"""`megatron-ladder cancel`: ends a run's jobs, after a checkpoint or at once."""

from pathlib import Path

from slurm.jobs import client, local
from slurm.jobs.client import Facts
from slurm.jobs.folders import Job, need_jobs, read_job
from slurm.watch.status import facts_of


def cancel(output: Path, *, now: bool) -> list[str]:
    """Ends jobs that are queued or run; a training that runs saves a checkpoint first, unless `now`.

    Returns:
        What was done, a line a job.

    Raises:
        UserError: nothing was submitted, or SLURM cannot be asked.
    """
    folders = need_jobs(output)
    if any(read_job(folder).job_id for folder in folders):
        client.call("squeue", "--version")  # raises UserError when there is no SLURM
    lines = []
    # The last first: a job that waits for another is gone before the other ends.
    for folder, facts in reversed(facts_of(folders).items()):
        job = read_job(folder)
        name = f"job {job.job_id}" if job.job_id else f"{folder}"
        if facts is None or any(fact.is_active for fact in facts):
            lines.append(f"{name}: {_end(folder, job, facts, now)}")
    return lines or [f"{output}: no job is queued or runs"]


def _end(folder: Path, job: Job, facts: list[Facts] | None, now: bool) -> str:
    in_good_order = job.command[0] == "train" and not now
    if job.launcher == "local":
        was_running = local.stop(folder, in_good_order=in_good_order)
        return _said(was_running and in_good_order)
    is_running = facts is None or any(fact.state == "RUNNING" for fact in facts)
    if in_good_order and is_running:
        # The script gets the signal, passes it on to the ranks, and does not queue the job again.
        client.call("scancel", "--batch", "--signal=USR2", str(job.job_id))
    else:
        client.call("scancel", str(job.job_id))
    return _said(in_good_order and is_running)


def _said(in_good_order: bool) -> str:
    if in_good_order:
        return (
            "asked to save a checkpoint and stop; `status` shows when it has, --now ends it at once"
        )
    return "cancelled"
