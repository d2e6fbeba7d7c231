"""The tree can be read: rooms are small, say what is in them, and stand in the README."""

import ast
import re
from pathlib import Path

import pytest

from tests.unit.test_layering import ROOMS as ORDER

ROOT = Path(__file__).parents[2]
PACKAGES = ("megatron_ladder", "pretrain", "data_prep", "slurm", "benchmarks/measuring")
ROOMS = sorted(
    str(file.parent.relative_to(ROOT)) for p in PACKAGES for file in (ROOT / p).rglob("__init__.py")
)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_is_in_it(room: str) -> None:
    said = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))
    assert said, f"{room}/__init__.py has no docstring"
    assert len(said.splitlines()[0]) > 20


@pytest.mark.parametrize(
    "room",
    [*ROOMS, "benchmarks", "benchmarks/checkpoints", "benchmarks/commands", "benchmarks/sequences"],
)
def test_a_room_is_small(room: str) -> None:
    files = sorted((ROOT / room).glob("*.py"))
    assert len(files) <= 14, f"{room} has {len(files)} Python files"
    for file in files:
        assert len(file.read_text().splitlines()) <= 400, file


def test_every_python_file_is_in_a_package() -> None:
    """setuptools installs folders with an __init__.py alone."""
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            assert str(file.parent.relative_to(ROOT)) in ROOMS, file


def in_the_readme() -> list[str]:
    """The folders in README's tree: a name below another has two more spaces before it."""
    found, above = list[str](), list[str]()
    tree = (ROOT / "README.md").read_text().partition("## Where things are")[2]
    for spaces, name in re.findall(r"^ {4}((?:  )*)(\w+)/ +\S", tree, re.M):
        above = [*above[: len(spaces) // 2], name]
        found.append("/".join(above))
    return found


@pytest.mark.parametrize("room", [*ROOMS, "tests", "benchmarks", "docs", "scripts"])
def test_a_room_has_its_line_in_the_readme(room: str) -> None:
    assert room in in_the_readme()


@pytest.mark.parametrize("package", ORDER)
def test_the_readmes_order_is_that_of_imports(package: str) -> None:
    """README says that a room imports only rooms that come before it."""
    rooms = [place.split("/")[1] for place in in_the_readme() if place.startswith(f"{package}/")]
    order = [room.split(".")[0] for room in ORDER[package].split()]
    assert list(dict.fromkeys(rooms)) == [room for room in dict.fromkeys(order) if room in rooms]


def test_the_readme_has_no_other_rooms() -> None:
    assert [room for room in in_the_readme() if not (ROOT / room).is_dir()] == []
