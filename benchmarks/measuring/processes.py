"""Memory of processes, from /proc."""

from pathlib import Path


def resident(what: str, pid: int | str = "self") -> int:
    """Bytes of a line of /proc/PID/status: VmRSS, VmHWM (the peak), RssAnon or RssFile.

    Raises:
        OSError, IndexError: the process has ended.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) * 1024
