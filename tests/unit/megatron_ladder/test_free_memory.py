"""The machine's free memory, with limits of control groups, from files as Linux writes them."""

from pathlib import Path

import psutil
import pytest

from megatron_ladder.free_memory import memory_here

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "proc/meminfo", "MemTotal: 67108864 kB\nMemAvailable: 33554432 kB")
    return tmp_path


def write(root: Path, name: str, text: object) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(f"{text}\n")


def limit(root: Path, group: str, most: object, used: int, files: int) -> None:
    """A group of version 2."""
    place = f"sys/fs/cgroup/{group}"
    write(root, f"{place}/memory.max", most)
    write(root, f"{place}/memory.current", used)
    write(root, f"{place}/memory.stat", f"anon {used - files}\ninactive_file {files}\nslab 0")


def test_the_machine_alone(root: Path) -> None:
    assert memory_here(root) == 32 * GIB
    write(root, "proc/self/cgroup", "0::/job/step")
    assert memory_here(root) == 32 * GIB


def test_a_control_group_and_those_above_it(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/job/step")
    limit(root, "job/step", "max", 3 * GIB, 0)
    assert memory_here(root) == 32 * GIB
    limit(root, "job", 8 * GIB, 5 * GIB, 2 * GIB)  # the kernel would give 2 GiB of files back
    assert memory_here(root) == 5 * GIB
    limit(root, "job/step", 4 * GIB, 3 * GIB, 0)
    assert memory_here(root) == GIB
    limit(root, "job/step", 4 * GIB, 5 * GIB, 0)
    assert memory_here(root) == 0
    limit(root, "other", 1, 0, 0)
    limit(root, "job/step", 4 * GIB, 3 * GIB, 0)
    assert memory_here(root) == GIB


def test_a_container_sees_its_group_as_the_root(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/somewhere/outside")
    limit(root, "", 6 * GIB, 2 * GIB, GIB)
    assert memory_here(root) == 5 * GIB


def test_control_groups_of_version_1(root: Path) -> None:
    write(root, "proc/self/cgroup", "9:cpu,cpuacct:/job\n4:memory:/job\n0::/")
    place = "sys/fs/cgroup/memory/job"
    write(root, f"{place}/memory.usage_in_bytes", 3 * GIB)
    write(root, f"{place}/memory.stat", f"inactive_file 7\ntotal_inactive_file {GIB}")
    write(root, f"{place}/memory.limit_in_bytes", 9223372036854771712)  # none
    assert memory_here(root) == 32 * GIB
    write(root, f"{place}/memory.limit_in_bytes", 4 * GIB)
    assert memory_here(root) == 2 * GIB


def test_this_machine() -> None:
    assert 0 < memory_here() <= 1.1 * psutil.virtual_memory().available
