"""Transformer Engine is given torch's cuDNN before it looks for the system's."""

import _ctypes
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SAY = """
import {}, os
loaded = {{line.split()[-1] for line in open("/proc/self/maps") if "libcudnn" in line}}
print(os.environ.get("CUDNN_HOME"), *loaded)
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder of Python packages: Transformer Engine, and NVIDIA's cuDNN, of some library that loads."""
    library = tmp_path / "nvidia" / "cudnn" / "lib" / "libcudnn_graph.so.9"
    library.parent.mkdir(parents=True)
    shutil.copyfile(_ctypes.__file__, library)
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").touch()
    return tmp_path


def found(package: str, packages: Path, **given: str) -> list[str]:
    """CUDNN_HOME and cuDNN's libraries in a process that has imported `package`."""
    path = os.pathsep.join([str(packages), str(Path(__file__).parents[3])])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CUDNN_")}
    done = subprocess.run(
        [sys.executable, "-c", SAY.format(package)],
        env={**environment, "PYTHONPATH": path, **given},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.parametrize("package", ["megatron_ladder", "pretrain"])
def test_torchs_is_named_and_loaded(package: str, packages: Path) -> None:
    home = packages / "nvidia" / "cudnn"
    library = str(home / "lib" / "libcudnn_graph.so.9")
    assert found(package, packages) == [str(home), library]
    # As in a process that this one starts.
    assert found(package, packages, CUDNN_HOME=str(home)) == [str(home), library]


def test_what_the_user_has_said_stays(packages: Path) -> None:
    assert found("megatron_ladder", packages, CUDNN_HOME="/mine") == ["/mine"]
    assert found("megatron_ladder", packages, CUDNN_PATH="/mine") == ["None"]


@pytest.mark.parametrize("missing", ["transformer_engine", "nvidia"])
def test_without_either_nothing_happens(missing: str, packages: Path) -> None:
    if find_spec(missing) is not None:
        pytest.skip(f"{missing} is installed")
    shutil.rmtree(packages / missing)
    assert str(packages) not in " ".join(found("megatron_ladder", packages))
