"""Transformer Engine is told of torch's cuDNN before it looks for the system's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SAY = "import {}, os; print(os.environ.get('CUDNN_HOME'))"


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder of Python packages with NVIDIA's cuDNN among them."""
    library = tmp_path / "nvidia" / "cudnn" / "lib" / "libcudnn.so.9"
    library.parent.mkdir(parents=True)
    library.touch()
    return tmp_path


def home_of(package: str, packages: Path, **given: str) -> str:
    """CUDNN_HOME in a process that has imported `package`."""
    path = os.pathsep.join([str(packages), str(Path(__file__).parents[3])])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CUDNN_")}
    done = subprocess.run(
        [sys.executable, "-c", SAY.format(package)],
        env={**environment, "PYTHONPATH": path, **given},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("package", ["megatron_ladder", "pretrain"])
def test_torchs_is_named(package: str, packages: Path) -> None:
    assert home_of(package, packages) == str(packages / "nvidia" / "cudnn")


def test_what_the_user_has_said_stays(packages: Path) -> None:
    assert home_of("megatron_ladder", packages, CUDNN_HOME="/mine") == "/mine"
    assert home_of("megatron_ladder", packages, CUDNN_PATH="/mine") == "None"


def test_without_one_nothing_is_said(packages: Path) -> None:
    (packages / "nvidia" / "cudnn" / "lib" / "libcudnn.so.9").unlink()
    assert str(packages) not in home_of("megatron_ladder", packages)
