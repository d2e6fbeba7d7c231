"""SLURM's commands, each with a limit on its time. `sacct` may fail: many clusters keep no accounts."""

import os
import subprocess
from dataclasses import dataclass

from slurm.errors import UserError

TIMEOUT_S = 60
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
ACTIVE = (*WAITING, "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING")

# What SLURM says when it refuses a job, and what the user can do.
ADVICE = {
    "invalid partition": "`sinfo -s` lists the partitions",
    "invalid account": "`sacctmgr show assoc user=$USER` lists your accounts and partitions",
    "invalid qos": "`sacctmgr show assoc user=$USER format=account,qos` lists what you may use",
    "invalid feature": "`sinfo -o '%N %f'` lists the features that nodes have",
    "reservation is invalid": "`scontrol show reservation` lists reservations and who may use them",
    "access/permission denied": "you may not use this reservation: `scontrol show reservation`",
    "invalid node name": "`sinfo -N` lists the nodes: correct nodelist or exclude",
    "invalid license": "`scontrol show licenses` lists licenses",
    "invalid number of nodes": (
        "a job gets all nodes of nodelist, so give --nodes as many; commands other than train have one "
        "node: submit them without nodelist, and train with --after"
    ),
    "node configuration is not available": (
        "no node has so many GPUs, cores or so much memory: `sinfo -N -o '%N %c %m %G'` shows nodes; "
        "lower gpus_per_node, cpus_per_task or memory, or --ranks-per-node; or exclude leaves too few nodes"
    ),
    "more processors requested than permitted": "lower cpus_per_task or --ranks-per-node",
    "time limit": "`sinfo -o '%P %l'` lists the partitions' limits: lower --time",
    "node count": "`scontrol show partition` has MaxNodes: lower --nodes",
    "job violates": "a limit of your account or QoS: `sacctmgr show qos` lists them",
    "dependency problem": "SLURM does not know the job of --after (it may be forgotten): leave it out",
    "unable to contact": "SLURM's controller does not answer: `scontrol ping`; try again later",
    "configuration source": "SLURM's commands find no slurm.conf here: submit on a login node",
    "connection refused": "SLURM's controller does not answer: `scontrol ping`; try again later",
}


@dataclass(frozen=True)
class Facts:
    """What is known of a job."""

    state: str
    """As SLURM names it: PENDING, RUNNING, COMPLETED, FAILED, ..."""
    reason: str = ""
    elapsed: str = ""
    limit: str = ""
    nodes: str = ""

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE


def environment() -> dict[str, str]:
    """The environment of SLURM's commands. It has no variables of a job that `submit` may run in, and none
    that stand for options (SBATCH_PARTITION, SLURM_CPUS_PER_TASK): submit/placement.py reads those that may
    decide something."""
    return {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not name.startswith(("SLURM_", "SBATCH_", "SQUEUE_"))
    }


def call(*argv: str) -> str:
    """Runs one of SLURM's commands and returns what it printed.

    Raises:
        UserError: it is missing, refuses, or does not answer.
    """
    try:
        done = subprocess.run(  # noqa: S603 (a list, no shell)
            argv,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            env=environment(),
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise UserError(
            f"there is no {argv[0]} here: submit on a machine of the cluster, or give "
            'launcher = "local" in the profile'
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{argv[0]} did not answer in {TIMEOUT_S} s: is SLURM's controller up (`scontrol ping`)?"
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"it ended with {done.returncode}"
        advice = [advice for text, advice in ADVICE.items() if text in said.lower()]
        raise UserError(": ".join([f"{argv[0]} refused ({said})", *advice[:1]]))
    return done.stdout


def max_array_size() -> int:
    """The cluster's limit: the numbers of an array's tasks are below it."""
    for line in call("scontrol", "show", "config").splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize":
            return int(value)
    return 1001  # SLURM's default


def job_facts(job_ids: list[str]) -> dict[str, list[Facts]] | None:
    """What SLURM knows of jobs, by id; an array has several Facts. None: SLURM cannot be asked."""
    if not job_ids:
        return {}
    found: dict[str, list[Facts]] = {}
    try:
        # Without --jobs, with which squeue fails when SLURM has forgotten one of them.
        listed = call("squeue", "--me", "-h", "-r", "-t", "all", "-o", "%F|%T|%r|%M|%l|%N")
    except UserError:
        return None
    for line in listed.splitlines():
        job_id, *facts = line.split("|")
        if job_id in job_ids:
            found.setdefault(job_id, []).append(Facts(*facts[:5]))
    forgotten = [job_id for job_id in job_ids if job_id not in found]
    if forgotten:
        try:
            listed = call("sacct", "-X", "-n", "-P", "-j", ",".join(forgotten), "-o", "JobID,State")
        except UserError:
            return found  # no accounts are kept
        for line in listed.splitlines():
            job_id, _, state = line.partition("|")
            found.setdefault(job_id.partition("_")[0], []).append(Facts(state.partition(" ")[0]))
    return found
