"""The memory of this machine that this process may still use, a GPU's aside."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


def memory_here(root: Path = Path("/")) -> int:
    """Bytes that are free, or that the kernel would free for this process, such as its copies of files.

    Limits of this process's control groups (containers, jobs; versions 1 and 2) count.

    Args:
        root: where /proc and /sys are.
    """
    facts = dict(line.split(":", 1) for line in _lines(root / "proc/meminfo"))
    free = int(facts["MemAvailable"].split()[0]) * 1024
    for group, (limit, used, reclaimable) in _groups(root):
        with contextlib.suppress(OSError, ValueError):  # no such files, or no limit
            most = int((group / limit).read_text())
            stat = dict(line.split() for line in _lines(group / "memory.stat"))
            taken = int((group / used).read_text()) - int(stat.get(reclaimable, 0))
            free = min(free, max(0, most - taken))
    return free


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """This process's control groups and those above them, each with the names of its facts."""
    place = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in _lines(root / "proc/self/cgroup"):
            _, controllers, name = line.split(":", 2)
            if not controllers:  # version 2
                base, names = place, ("memory.max", "memory.current", "inactive_file")
            elif controllers == "memory":
                base = place / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            group = base / name.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(base):
                    yield folder, names


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines()
