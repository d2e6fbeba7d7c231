"""`megatron-ladder status`: what a run wrote about itself, and what SLURM knows of its jobs.

A run writes RUN/status.json, which is read without SLURM; of jobs, only their folders are then known.
"""

import time
from collections import Counter
from pathlib import Path
from typing import Any

from slurm.errors import UserError
from slurm.files import read_json
from slurm.jobs import client
from slurm.jobs.client import Facts
from slurm.jobs.folders import Job, job_folders, read_job
from slurm.jobs.local import local_facts
from slurm.watch.history import read_history

AT_WORK = ("starting", "training", "validating", "saving", "measuring")
# A run that was heard of so lately may be at work. It writes each second, but a step may take minutes.
FRESH_S = 300
# SLURM's reasons for a job's state, in plain words, and what to do.
REASONS = {
    "Resources": "waits for free nodes",
    "Priority": "waits for jobs with a higher priority",
    "BeginTime": "queued again, starts in a moment",
    "Dependency": "waits for the job before it",
    "DependencyNeverSatisfied": "never ran: a job it waited for failed: mend that, submit from that job on",
    "PartitionNodeLimit": "asks for more nodes than the partition has: cancel it, submit fewer --nodes",
    "PartitionTimeLimit": "asks for more time than the partition gives: cancel it, submit less --time",
    "JobHeldUser": "held: `scontrol release`",
    "JobHeldAdmin": "held by the cluster's administrators",
    "TimeLimit": "its time was over before it could stop in good order: give a longer --signal-lead",
    "NonZeroExitCode": "its command failed: see `megatron-ladder logs`",
    "NodeDown": "a node went down",
}


def status(outputs: list[Path]) -> str:
    """How runs, data sets and exports stand: a paragraph for each."""
    return "\n".join(_paragraph(output) for output in outputs)


def facts_of(folders: list[Path]) -> dict[Path, list[Facts] | None]:
    """What is known of jobs, by folder. None: SLURM cannot be asked. Empty: SLURM has forgotten the job."""
    jobs = {folder: read_job(folder) for folder in folders}
    known = client.job_facts([job.job_id for job in jobs.values() if job.job_id])
    found: dict[Path, list[Facts] | None] = {}
    for folder, job in jobs.items():
        if job.launcher == "local":
            found[folder] = [local_facts(folder, job)]
        elif known is None:
            found[folder] = None
        else:
            found[folder] = known.get(str(job.job_id), [])
    return found


def _paragraph(output: Path) -> str:
    folders = job_folders(output)
    facts = facts_of(folders)
    lines = []
    unknown = None
    if said := _read_status(output):
        # squeue lists one's own jobs. Where no accounts are kept, nothing is known of a colleague's.
        is_fresh = said.get("state") in AT_WORK and _age(said) < FRESH_S
        if folders and is_fresh and facts[folders[-1]] == []:
            unknown = folders[-1]
        lines += _run_lines(said, [] if unknown else list(facts.values()))
    elif not folders:
        why = "was not submitted, and has no status.json" if output.exists() else "does not exist"
        return f"{output}: {why}"
    lines += [
        _job_line(folder, read_job(folder), known, folder == unknown)
        for folder, known in facts.items()
    ]
    return "\n  ".join([f"{output}: {lines[0]}", *lines[1:]])


def _read_status(run: Path) -> dict[str, Any] | None:
    """What status.json says; a field of another type than it must have is as if it were not there."""
    try:
        said = read_json(run / "status.json")
    except (OSError, UserError):
        return None
    return {name: value for name, value in said.items() if _is_right(name, value)}


def _is_right(name: str, value: Any) -> bool:
    if name in ("state", "phase", "watch"):
        return isinstance(value, str) and value.isprintable()
    if name == "reason":
        return isinstance(value, str)
    if name in ("step", "train_steps", "last_checkpoint", "starts"):
        return type(value) is int and 0 <= value < 1 << 63
    if name in ("loss", "tokens_per_second", "eta_s", "unix_time"):
        return type(value) in (int, float) and -1e15 < value < 1e15
    return False


def _age(said: dict[str, Any]) -> float:
    """Seconds since a run was last heard of."""
    return max(time.time() - said.get("unix_time", 0), 0)


def _run_lines(said: dict[str, Any], facts: list[list[Facts] | None]) -> list[str]:
    state, step, of = said.get("state"), said.get("step") or 0, said.get("train_steps")
    doing = f"{state} ({phase})" if state == "starting" and (phase := said.get("phase")) else state
    head = f"{doing}, step {step:,}" + (f" of {of:,} ({step / of:.1%})" if of else "")
    if (loss := said.get("loss")) is not None:
        head += f", loss {loss:.4f}"
    # A killed process could not write that it ended: SLURM knows it, or the local process is missing.
    known = [fact for several in facts if several is not None for fact in several]
    is_over = bool(facts) and None not in facts and not any(f.state == "RUNNING" for f in known)
    if state in AT_WORK and is_over:
        head = f"not running; when last heard of: {head}"
    elif state in AT_WORK:
        is_trained = state == "measuring"  # no step is to come
        if (rate := said.get("tokens_per_second")) is not None and not is_trained:
            head += f", {rate:,.0f} tokens/s"
        if (eta := said.get("eta_s")) is not None and not is_trained:
            head += f", {duration(eta)} to go"
        if beside := said.get("watch"):
            head += f"; beside it: {beside}"
    checkpoint = said.get("last_checkpoint")
    line = f"last checkpoint: {'none yet' if checkpoint is None else f'step {checkpoint:,}'}"
    if (starts := said.get("starts")) is not None:
        line += f"; restarts: {max(starts - 1, 0)}"
    if said.get("reason"):
        line += f"; why it stopped: {_shown(said['reason'])}"
    if said.get("unix_time"):
        line += f"; heard of {duration(_age(said))} ago"
    return [head, line]


def _shown(reason: str) -> str:
    """In one line. What a library said may have many, and characters that would steer the terminal."""
    printable = "".join(c if c.isprintable() else "?" for c in " ".join(reason.split()))
    return printable if len(printable) <= 500 else f"{printable[:500]}..."


def _job_line(folder: Path, job: Job, facts: list[Facts] | None, is_unknown: bool) -> str:
    what = " ".join(job.command[:2] if job.command[0] == "data" else job.command[:1])
    line = f"{what}, {f'job {job.job_id}' if job.job_id else 'here'} ({folder}): "
    if facts is None:
        line += "SLURM cannot be asked here"
    elif is_unknown:
        line += "unknown: SLURM does not list it among your jobs: it is another user's, or has just ended"
    elif not facts:
        line += "forgotten by SLURM: it is over"
    elif len(facts) > 1:
        counts = Counter(fact.state for fact in facts)
        line += ", ".join(f"{count} {state}" for state, count in counts.most_common())
    else:
        line += _in_words(facts[0])
    history = read_history(folder)
    if history.starts > 1:
        line += f"; started {history.starts} times"
    if history.last:
        line += f"; last: {history.last}"
    return line


def _in_words(fact: Facts) -> str:
    words = fact.state
    if fact.nodes and fact.is_active:
        words += f" on {fact.nodes}, {fact.elapsed} of {fact.limit}"
    if fact.reason not in ("", "None"):
        words += f", {REASONS.get(fact.reason, fact.reason)}"
    return words


def duration(seconds: float) -> str:
    """For people: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes} min"
    if hours < 24:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
