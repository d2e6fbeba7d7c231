"""`megatron-ladder submit`, as a process of its own: libraries warn when they are imported."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.data_sets import write_data_set

ROOT = Path(__file__).parents[4]


def submitted(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    (folder / "p.toml").write_text(f'launcher = "local"\npython = "{sys.executable}"\n')
    command = [sys.executable, "-m", "pretrain.cli", "submit", "--profile", "p.toml", *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_libraries_keep_quiet(tmp_path: Path) -> None:
    data = str(write_data_set(tmp_path / "data"))
    train = ["train", "--preset", "debug", "--data.paths", data, "--output-dir", "run"]
    ended = submitted(tmp_path, "--dry-run", *train, "then", "export", "run", "model")
    assert ended.returncode == 0
    assert "pretrain.cli export run model" in ended.stdout
    assert not re.search("Warning|megatron.core", ended.stderr), ended.stderr
    if find_spec("transformer_engine") is None:  # it has lines of its own, in every command
        assert ended.stderr == ""


def test_mistakes_of_all_packages_are_a_line(tmp_path: Path) -> None:
    for argv, message in {
        ("train", "--preset", "debug"): "no --output-dir: give the folder",
        ("--after", "x", "report", "run"): "--after x: give a job's number",  # slurm's own
        # Of a later job the options alone are checked.
        (
            *("--ranks-per-node", "2", "--after", "1"),
            *("train", "--preset", "debug", "--output-dir", "run", "--attention", "te"),
            *("--parallel.context-parallel-size", "2", "--data.no-attend-across-documents"),
        ): "attention te does not keep documents apart",
    }.items():
        ended = submitted(tmp_path, *argv)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.startswith(f"megatron-ladder submit: {message}")
        assert ended.stderr.count("\n") == 1
