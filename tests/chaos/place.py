"""Where a run is disturbed: its disk, its cluster of fake nodes or this machine, its processes."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

from pretrain import cli
from slurm.jobs.folders import job_folders, read_job
from slurm.jobs.local import stop
from slurm.watch.status import facts_of
from tests.data_sets import write_data_set
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
NODES = 3  # two train, one is to spare
DISK_BYTES = 256 << 20
OPTIONS = (
    "--preset debug --save-interval 5 --eval-interval 50 --no-tensorboard --faults.not-finite skip "
    "--faults.max-bad-steps 1000 --faults.hang-s 6"
)


class Place:
    """A folder with data, runs and a profile.

    Args:
        folder: holds all of it.
        cluster: None: ranks are started on this machine, by torchrun.
        has_own_disk: nobody minds when it is full.
    """

    def __init__(
        self,
        folder: Path,
        cluster: Cluster | None,
        *,
        has_own_disk: bool,
        train: tuple[str, ...] = (),
    ) -> None:
        self._train = train
        self.folder, self.cluster, self.has_own_disk = folder, cluster, has_own_disk
        self._data = write_data_set(folder / "data", vocab_size=400)
        self._python = folder / "rank"
        source = (Path(__file__).parent / "rank.py").read_text()
        self._python.write_text(f"#!{sys.executable}\n{source}")
        self._python.chmod(0o755)
        self._returning: list[threading.Timer] = []
        self._argv: list[str] = []
        self.faults = folder / "faults"  # rank.py reads them
        self.faults.mkdir()
        (folder / "empty").mkdir()

    def submit(self, run: Path, steps: int, nan_steps: list[int]) -> None:
        """Submits a training of two ranks, on two nodes where there are nodes."""
        environment = {
            "PYTHONPATH": ROOT,
            "CHAOS_NAN": " ".join(map(str, nan_steps)),
            "CHAOS_FOLDER": self.faults,
            "PYTHON_EXEC": self._python,  # for torchrun
        }
        profile = self.folder / f"{run.name}.toml"
        lines = [f"{name} = {json.dumps(str(value))}" for name, value in environment.items()]
        head = [
            f'launcher = "{"slurm" if self.cluster else "local"}"',
            f"python = {json.dumps(str(self._python))}",
        ]
        profile.write_text("\n".join([*head, "[environment]", *lines]) + "\n")
        where = "--nodes 2 --spare-nodes 1" if self.cluster else "--ranks-per-node 2"
        train = f"train {OPTIONS} --schedule.train-steps {steps}"
        paths = ["--data.paths", str(self._data), "--output-dir", str(run)]
        command = [*train.split(), *self._train, *paths]
        self._argv = ["submit", "--profile", str(profile), *where.split(), *command]
        self.submit_again()

    def submit_again(self) -> None:
        """The newest submission once more, which goes on with its run."""
        assert cli.main(self._argv) == 0

    def state(self, run: Path) -> str:
        """Of the run's newest job, in SLURM's words; "" while SLURM does not answer."""
        folder = job_folders(run)[-1]
        facts = facts_of([folder])[folder]
        return facts[0].state if facts else ""

    def ranks(self, run: Path) -> list[psutil.Process]:
        """The run's ranks, in order, without their own children."""
        found = [
            p for p in _processes(run) if "pretrain" in p.info["cmdline"][:5] and _is_python(p)
        ]
        pids = {p.pid for p in found}
        roots = [p for p in found if p.info["ppid"] not in pids]
        return sorted(roots, key=lambda p: int(p.environ()["RANK"]))

    def launchers(self, run: Path) -> list[psutil.Process]:
        """What started the ranks: srun, and its helper; or `megatron-ladder train`, which runs torchrun."""
        if self.cluster:
            found = [p for p in _processes(run) if p.info["name"] == "srun"]
            pids = {p.pid for p in found}
            return sorted(found, key=lambda p: p.info["ppid"] in pids)
        return [p for p in _processes(run) if "pretrain.cli" in p.info["cmdline"] and _is_python(p)]

    def warn_of_time_limit(self, run: Path) -> None:
        """As SLURM does at --signal's time."""
        assert self.cluster
        folder = job_folders(run)[-1]
        self.cluster.call("scancel", "--batch", "--signal=USR1", str(read_job(folder).job_id))

    def nodes(self, run: Path) -> list[int]:
        """Where ranks are."""
        folder = job_folders(run)[-1]
        lines = [line.split() for line in (folder / "history").read_text().splitlines()]
        hosts = next(line[5:] for line in reversed(lines) if line[1] == "start")
        return [int(host.removeprefix("node")) for host in hosts]

    def crash(self, node: int, away_s: float) -> None:
        """A node dies, and comes back later."""
        assert self.cluster
        self.cluster.crash(node)
        self._returning.append(threading.Timer(away_s, self.cluster.start_node, [node]))
        self._returning[-1].start()

    @contextlib.contextmanager
    def unmounted_data(self, node: int) -> Iterator[None]:
        """Meanwhile one node does not see the data set."""
        assert self.cluster
        self.cluster.hide(node, self._data, self.folder / "empty")
        try:
            yield
        finally:
            self.cluster.show(node, self._data)

    def sentences(self, run: Path, words: str) -> int:
        """How often a rank has said in the jobs' logs why it failed, with these words."""
        files = [folder / "log" for folder in job_folders(run)]
        texts = [f.read_text(errors="replace") for f in files if f.exists()]
        lines = [line for text in texts for line in text.splitlines()]
        return sum("megatron-ladder train: rank " in line and words in line for line in lines)

    def fill(self, left: int) -> Path:
        """A file that takes all of the disk but so many bytes; called again, it takes what was freed."""
        ballast = self.folder / "ballast"
        more = shutil.disk_usage(self.folder).free - left
        with ballast.open("ab") as file, contextlib.suppress(OSError):  # others are quicker
            if more > 0:
                os.posix_fallocate(file.fileno(), file.tell(), more)
        return ballast

    def logs(self, run: Path) -> str:
        """The ends of what a run's job wrote, for what went wrong."""
        files = [f for folder in job_folders(run) for f in (folder / "history", folder / "log")]
        texts = [f.read_text(errors="replace")[-6000:] for f in files if f.exists()]
        return "\n".join([*texts, self.cluster.logs() if self.cluster else ""])

    def close(self) -> None:
        for timer in self._returning:
            timer.cancel()
            timer.join()
        if self.cluster is None:
            for run in self.folder.iterdir():
                for folder in job_folders(run):
                    stop(folder, in_good_order=False)


@contextlib.contextmanager
def make_place(folder: Path, launcher: str, train: tuple[str, ...] = ()) -> Iterator[Place]:
    """A place in an empty folder; SLURM's commands find its cluster meanwhile.

    Args:
        train: more options of the trainings.
    """
    # Mounted before nodes start: they live in mount namespaces of their own.
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    has_own_disk = subprocess.run(mount, capture_output=True).returncode == 0
    with contextlib.ExitStack() as stack:
        if has_own_disk:
            stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
        stack.enter_context(contextlib.chdir(ROOT))
        cluster = stack.enter_context(_cluster()) if launcher == "slurm" else None
        place = Place(folder, cluster, has_own_disk=has_own_disk, train=train)
        stack.callback(place.close)
        yield place


@contextlib.contextmanager
def _cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="lab", dir="/tmp", ignore_cleanup_errors=True) as name:
        cluster = Cluster(Path(name), NODES)
        names = ("PATH", "SLURM_CONF")
        before = {name: os.environ.get(name) for name in names}
        os.environ.update({name: cluster.environment[name] for name in names})
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.call("scancel", "--me")
            cluster.stop()
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _processes(run: Path) -> list[psutil.Process]:
    found = psutil.process_iter(["cmdline", "name", "ppid"])
    return [p for p in found if str(run) in (p.info["cmdline"] or [])]


def _is_python(process: psutil.Process) -> bool:
    return Path(process.info["cmdline"][0]).name.startswith("python")
