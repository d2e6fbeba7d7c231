"""Memory of processes, from /proc; what a command takes."""

import contextlib
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil


def resident(what: str, pid: int | str = "self") -> int:
    """Bytes of a line of /proc/PID/status: VmRSS, VmHWM (the peak), RssAnon or RssFile.

    Raises:
        OSError, IndexError: the process has ended.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) * 1024


class Watch(threading.Thread):
    """The most memory that any process below this one has had."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak: dict[int, tuple[int, bool]] = {}
        self._over = threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self._over.wait(0.05):
            for child in me.children(recursive=True):
                with contextlib.suppress(OSError, IndexError, ValueError, psutil.Error):
                    below = child.ppid() != me.pid
                    self.peak[child.pid] = (resident("VmHWM", child.pid), below)

    def stop(self) -> tuple[int, int]:
        """Of the process that was started, and the largest of those it started."""
        self._over.set()
        self.join()
        parents = [peak for peak, below in self.peak.values() if not below]
        workers = [peak for peak, below in self.peak.values() if below]
        return max(parents, default=0), max(workers, default=0)


def measured(command: list[str], environment: dict[str, str] | None = None) -> dict[str, float]:
    """Runs a command to its end, which must be good.

    Args:
        environment: all of its environment variables; None: those of this process.

    Returns:
        Seconds of the clock, CPU seconds of all its processes, and the most memory that the first of its
        processes had, and that any other had, in bytes.
    """
    watch = Watch()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    watch.start()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)  # noqa: S603
    wall = time.perf_counter() - begin
    parent, worker = watch.stop()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "parent_bytes": parent, "worker_bytes": worker}
