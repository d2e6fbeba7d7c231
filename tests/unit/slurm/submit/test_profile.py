"""Profiles: what is read, and what is refused, with a word on what to do."""

from dataclasses import fields
from pathlib import Path

import pytest

from slurm.errors import UserError
from slurm.submit.placement import Placement
from slurm.submit.profile import Container, Profile, load_profile
from slurm.submit.render import Resources

EXAMPLE = Path(__file__).parents[4] / "slurm" / "profiles" / "example.toml"


def read(tmp_path: Path, text: str) -> Profile:
    path = tmp_path / "profile.toml"
    path.write_text(text)
    return load_profile(path)


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    return str(error.value)


def test_the_example_is_read() -> None:
    profile = load_profile(EXAMPLE)
    assert (profile.partition, profile.gpus_per_node, profile.cpus_per_task) == ("gpu", 8, 12)
    assert profile.environment == {"HF_HOME": "/shared/hf"}
    assert profile.modules == ("cuda/13.0",)


def test_all_of_the_example_is_read(tmp_path: Path) -> None:
    """What it shows as a comment as well."""
    mounts, container, placement = [], [], []
    for line in EXAMPLE.read_text().splitlines():
        text = line.removeprefix("# ").strip()
        if text.startswith("mounts ="):
            mounts = [text]
        elif text.startswith(("[container]", "image =", "runtime =")):
            container.append(text)
        elif (
            text.startswith(tuple(f"{field.name} =" for field in fields(Placement)))
            and text != line
        ):
            placement.append(text)
    profile = read(tmp_path, "\n".join([*mounts, *placement, EXAMPLE.read_text(), *container]))
    assert all(getattr(profile, field.name) for field in fields(Placement))
    assert profile.container == Container("nvcr.io#nvidia/pytorch:25.09-py3", "pyxis")
    assert profile.mounts == ("/shared:/shared", "/scratch:/scratch")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('partion = "gpu"', "no field partion: did you mean partition?"),
        (
            "[container]\nimage='a'\nruntime='pyxis'\nimge='b'",
            "container.imge: did you mean image?",
        ),
        ("[container]\nimage='a'", "container.runtime is missing"),
        ("[container]\nimage='a'\nruntime='docker'", "it must be pyxis or apptainer"),
        ('setup = "rm -rf x"', "no field setup: there are partition, account"),
        ('gpus_per_node = "8"', "gpus_per_node is '8': it must be a whole number"),
        ("gpus_per_node = true", "it must be a whole number"),
        ("gpus_per_node = -1", "must be at least 0"),
        ("cpus_per_task = 0", "at least 1"),
        ("mounts = 3", "mounts is 3: it must be another kind of value"),
        ("environment = 'KEY=1'", "environment must be a table: [environment], then lines NAME"),
        ("[environment]\nA = 1", "environment.A must be a string"),
        ('[environment]\nUID = "1"', "environment.UID: a shell sets it"),
        ('[environment]\nMEGATRON_LADDER_ENDS = "1"', "the script sets it"),
        ('[environment]\n"A-B" = "1"', "environment 'A-B' is not allowed"),
        ('[environment]\n"A=1; id" = "1"', "is not allowed"),
        ('[environment]\nRANK = "1"', "environment.RANK: the script sets it"),
        ('[environment]\nA = "a\\u0000b"', "environment.A holds a NUL character"),
        ('mounts = ["/a:/b"]', "mounts are a container's"),
        ('launcher = "kubernetes"', "it must be slurm or local"),
        ("launcher='local'\n[container]\nimage='a'\nruntime='pyxis'", "pyxis needs SLURM"),
        ("partition = ", "is not TOML"),
        ('exclusive = "yes"', "exclusive is 'yes': it must be true or false"),
        ('exclud = "node1"', "no field exclud: did you mean exclude?"),
        (
            'mail_type = "END,SOMETIMES"',
            "mail_type 'END,SOMETIMES' is not allowed: give NONE, BEGIN",
        ),
        ('comment = "two\\nlines"', "comment 'two\\nlines' is not allowed"),
        ('exclude = "/etc/hosts"', "exclude '/etc/hosts' is not allowed"),
    ],
)
def test_mistakes_are_said(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "environment = 'KEY=s3cret'",
        "environment = ['KEY=s3cret']",
        "[environment]\nKEY = ['s3cret']",
        "[environment.KEY]\nvalue = 's3cret'",
        "[environment]\nKEY = 's3cret\\u0000'".replace("'", '"'),
        "KEY = 's3cret'",
        "[environment]\nKEY = s3cret",
        "[environment]\nKEY = 's3cret\nMORE = 1",
        "[environment]\nUID = 's3cret'",
    ],
)
def test_a_refusal_does_not_repeat_a_secret(tmp_path: Path, text: str) -> None:
    assert "s3cret" not in refused(tmp_path, text)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: copy ") as error:
        load_profile(tmp_path / "no.toml")
    assert Path(str(error.value).split("copy ")[1]).samefile(EXAMPLE)
    with pytest.raises(UserError, match="is a folder"):
        load_profile(tmp_path)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"nodes": 0}, "--nodes 0: it must be at least 1"),
        ({"ranks_per_node": 0}, "--ranks-per-node 0"),
        ({"spare_nodes": -1}, "--spare-nodes -1"),
        ({"time": "90"}, "write HH:MM:SS"),
        ({"time": "1:00:00\n#SBATCH --nodes=9"}, "write HH:MM:SS"),
        ({"time": "00:02:00"}, "is not longer than --signal-lead"),
        ({"time": "1-00:00:00", "signal_lead": 65536}, "--signal-lead 65536"),
    ],
)
def test_resources_are_checked(asked: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        Resources(**{"nodes": 1, "ranks_per_node": 1, **asked})
    assert message in str(error.value)


def test_an_environment_is_an_interpreter(tmp_path: Path) -> None:
    assert Profile(python=str(tmp_path)).interpreter() == str(tmp_path / "bin" / "python")
    assert Profile(python="/opt/python3").interpreter() == "/opt/python3"
    assert Profile(container=Container("a", "pyxis")).interpreter() == "python"
