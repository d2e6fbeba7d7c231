import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain import cli
from slurm.jobs.folders import job_folders, read_job
from tests.slurm.cluster import Cluster, missing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def whole_cluster() -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="lab", dir="/tmp"))  # short, as sockets' paths are
    cluster = Cluster(folder, nodes=4)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(whole_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster, idle, for commands of this process."""
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, whole_cluster.environment[name])
    monkeypatch.chdir(ROOT)
    yield whole_cluster
    whole_cluster.call("scancel", "--me")
    for node in range(whole_cluster.nodes):
        if f"node{node}" not in whole_cluster._processes:
            whole_cluster.start_node(node)
    whole_cluster.wait_for_nodes(whole_cluster.nodes)


@pytest.fixture
def profile(tmp_path: Path) -> Callable[..., Path]:
    """Writes a profile: of the stand-in for training, or of this interpreter."""

    def write(*, stand_in: dict | None = None, more: str = "", **environment: str) -> Path:
        python = sys.executable
        if stand_in is not None:
            python = str(tmp_path / "stand_in")
            source = (ROOT / "tests" / "slurm" / "stand_in.py").read_text()
            Path(python).write_text(f"#!{sys.executable}\n{source}")
            Path(python).chmod(0o755)
            environment["STAND_IN"] = json.dumps(stand_in)
        environment["PYTHONPATH"] = str(ROOT)
        lines = [f"{name} = {json.dumps(value)}" for name, value in environment.items()]
        path = tmp_path / "profile.toml"
        text = [more, f"python = {json.dumps(python)}", "[environment]", *lines]
        path.write_text("\n".join(text) + "\n")
        return path

    return write


@pytest.fixture
def submit(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `megatron-ladder submit`; returns what it printed."""

    def run(*words: object) -> str:
        status = cli.main(["submit", *map(str, words)])
        output = capsys.readouterr()
        assert status == 0, output.err
        return output.out

    return run


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `megatron-ladder status` says."""

    def run(*outputs: Path) -> str:
        assert cli.main(["status", *map(str, outputs)]) == 0
        return capsys.readouterr().out

    return run


def wait_until(
    condition: Callable[[], object], timeout_s: float, explain: Callable[[], str]
) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, explain()
        time.sleep(0.2)


def job_ids(output: Path) -> list[str]:
    return [str(read_job(folder).job_id) for folder in job_folders(output)]


def log(output: Path) -> str:
    return "\n".join(f.read_text() for folder in job_folders(output) for f in folder.glob("log*"))
