"""scripts/constraints-gpu.txt: within what the project supports, and whole as far as metadata say."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pretrain.model import cudnn

ROOT = Path(__file__).parents[2]
LACKS_A_LIBRARY = "9.20.0.48"  # of cuDNN


def pins() -> dict[str, str]:
    """Versions by package."""
    found = {}
    for line in (ROOT / "scripts" / "constraints-gpu.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            found[canonicalize_name(name)] = version
    return found


def installed(package: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def test_they_are_supported_and_none_lacks_a_library() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = map(Requirement, project["dependencies"] + project["optional-dependencies"]["te"])
    named = set()
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        if name in pins() and (not marker or marker.evaluate({"python_version": "3.12"})):
            assert requirement.specifier.contains(pins()[name]), requirement
            named.add(name)
    assert named == {"torch", "megatron-core", "transformer-engine"}
    assert pins()["nvidia-cudnn-cu13"] != LACKS_A_LIBRARY


def test_what_packages_require_of_each_other_is_what_is_pinned() -> None:
    here = [
        p for p in map(installed, pins()) if p and p.version == pins()[canonicalize_name(p.name)]
    ]
    if not here:
        pytest.skip("none of these versions is installed")
    for requirement in (Requirement(text) for package in here for text in package.requires or []):
        name, marker = canonicalize_name(requirement.name), requirement.marker
        if name in pins() and (not marker or marker.evaluate({"extra": ""})):
            assert requirement.specifier.contains(pins()[name]), requirement


def test_the_pinned_cudnn_is_whole() -> None:
    found = installed("nvidia-cudnn-cu13")
    if found is None or found.version != pins()["nvidia-cudnn-cu13"]:
        pytest.skip("it is not installed")
    (graph,) = (f for f in found.files or [] if "libcudnn_graph" in f.name)
    assert cudnn.lacking(Path(str(found.locate_file(graph)))) == []
