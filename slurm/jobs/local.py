"""launcher = "local": the scripts of a chain, one after another, on this machine and in the background.

`python -m slurm.jobs.local FOLDER...` is that background process.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from slurm.errors import UserError
from slurm.files import read_bounded, write_atomically
from slurm.jobs.client import Facts
from slurm.jobs.folders import Job

STOPPED = "75"
"""The exit status of a command that stopped in good order, as it was asked to."""


def start_chain(folders: list[Path]) -> list[float]:
    """Starts the scripts of `folders`. Returns the process that runs them: its id, and when it began."""
    # -P: import nothing from the current folder, unless that is a checkout, which may not be installed.
    safe = [] if Path.cwd() == Path(__file__).parents[2] else ["-P"]
    process = subprocess.Popen(  # noqa: S603 (a list, no shell)
        [sys.executable, *safe, "-m", "slurm.jobs.local", *map(str, folders)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # it outlives the terminal
    )
    return [process.pid, psutil.Process(process.pid).create_time()]


def run_chain(folders: list[Path]) -> None:
    """Runs the scripts until one fails."""
    for folder in folders:
        if (folder / "exit").exists():  # cancelled before it began
            return
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 (a list, no shell)
                ["/bin/bash", str(folder / "job.sh")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        created = psutil.Process(process.pid).create_time()
        write_atomically(folder / "pid", f"{process.pid} {created}\n")
        status = process.wait()
        write_atomically(folder / "exit", f"{status if status >= 0 else 128 - status}\n")
        if status:
            return


def local_facts(folder: Path, job: Job) -> Facts:
    """What is known of a job, in SLURM's words."""
    try:
        status = read_bounded(folder / "exit").strip()
        shown = status if status.isprintable() else "unknown"
        if status == STOPPED:
            return Facts(
                "CANCELLED", "it stopped in good order, and goes on when it is submitted again"
            )
        return Facts("COMPLETED" if status == "0" else "FAILED", f"exit status {shown:.20}")
    except (FileNotFoundError, UserError):
        pass
    if _running_pid(folder) is not None:
        return Facts("RUNNING")
    if job.runner and _is_alive(int(job.runner[0]), job.runner[1]):
        return Facts("PENDING", "Dependency")
    if (folder / "pid").exists():
        return Facts("FAILED", "its process was killed, or the machine went down")
    return Facts("CANCELLED", "DependencyNeverSatisfied")


def stop(folder: Path, *, in_good_order: bool) -> bool:
    """Ends a job. Returns whether it was running."""
    pid = _running_pid(folder)
    if pid is None:
        if not (folder / "exit").exists():
            write_atomically(folder / "exit", "cancelled\n")
        return False
    if in_good_order:
        os.kill(pid, signal.SIGUSR2)
    else:
        os.killpg(pid, signal.SIGKILL)
    return True


def _running_pid(folder: Path) -> int | None:
    try:
        pid, created = read_bounded(folder / "pid").split()
        number, when = int(pid), float(created)
    except (FileNotFoundError, ValueError):
        return None
    return number if 0 < number < 1 << 31 and _is_alive(number, when) else None


def _is_alive(pid: int, created: float) -> bool:
    """Whether the process made at `created` still runs; a later one may have got its number."""
    try:
        process = psutil.Process(pid)
        return process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    run_chain([Path(folder) for folder in sys.argv[1:]])
