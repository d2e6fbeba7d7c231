"""A cluster's profile: a TOML file, read into a frozen dataclass.

No shell runs what stands in it. A value for an #SBATCH line may have only the characters of such
values; all others are quoted when a script is rendered (render.py).
"""

import dataclasses
import difflib
import sys
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slurm.errors import UserError
from slurm.files import read_bounded
from slurm.submit.placement import NAME, Placement, check

# Set by the script itself for every rank (train.sh.jinja).
OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MEGATRON_LADDER_ENDS")
# A shell lets nobody set these.
OF_THE_SHELL = ("BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID")


@dataclass(frozen=True)
class Container:
    """The image that ranks run in."""

    image: str
    """What the runtime takes: nvcr.io#nvidia/pytorch:25.09-py3, or a file."""
    runtime: Literal["pyxis", "apptainer"]
    """pyxis: SLURM's plugin (enroot), options of srun. apptainer: a command on the nodes."""


@dataclass(frozen=True)
class Profile(Placement):
    """Where jobs run, and with what modules, variables, container and Python."""

    launcher: Literal["slurm", "local"] = "slurm"
    """local: the same script on this machine, in the background, without SLURM."""
    gpus_per_node: int = 0
    """0: ranks train on the CPU."""
    cpus_per_task: int = 1
    """For each rank, or for a task of data preparation."""
    memory: str | None = None
    """A node's, as sbatch takes it: "200G"; "0": all of it. None: the partition's default."""
    container: Container | None = None
    mounts: tuple[str, ...] = ()
    """Folders for the container: "/here:/there", or "/here:/there:ro"."""
    modules: tuple[str, ...] = ()
    """Loaded by `module load` before anything else."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the commands. They may be secret: they are on no command line, and in files
    that only the user may read."""
    python: str = ""
    """An interpreter, or a virtual environment's folder, that has this package. "": the one that
    `submit` runs on, or a container's `python`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("memory", self.memory, NAME)
        for name in self.modules:
            check("modules", name, r"[A-Za-z0-9][A-Za-z0-9_.+/-]*")
        for name in self.environment:
            check("environment", name, r"[A-Za-z_][A-Za-z0-9_]*")
            if name in OURS:
                raise UserError(
                    f"environment.{name}: the script sets it, for each rank to its own value"
                )
            if name in OF_THE_SHELL:
                raise UserError(f"environment.{name}: a shell sets it, and no other can")
        if self.gpus_per_node < 0 or self.cpus_per_task < 1:
            raise UserError(
                f"gpus_per_node {self.gpus_per_node} must be at least 0, and cpus_per_task "
                f"{self.cpus_per_task} at least 1"
            )
        check("python", self.python or None, r"[^-\x00][^\x00]*")
        if self.mounts and self.container is None:
            raise UserError("mounts are a container's: give [container], or leave them out")
        for mount in self.mounts:  # pyxis separates mounts by commas, and both runtimes read colons
            check("mounts", mount, r"/[^:,\x00\n]*:/[^:,\x00\n]*(:[a-z+]+)?")
        if self.container:
            check("container.image", self.container.image, r"[^-\x00\s][^\x00\n]*")
            if self.launcher == "local" and self.container.runtime == "pyxis":
                raise UserError(
                    "container.runtime pyxis needs SLURM: with launcher local, give apptainer"
                )

    def interpreter(self) -> str:
        """The command that starts Python."""
        if not self.python:
            return "python" if self.container else sys.executable
        path = Path(self.python).expanduser()
        return str(path / "bin" / "python" if path.is_dir() else path)


def load_profile(path: Path) -> Profile:
    """Reads a profile.

    Raises:
        UserError: the file is missing, is no TOML, or has a field or a value that does not exist.
    """
    try:
        values = tomllib.loads(read_bounded(path))
    except FileNotFoundError:
        raise UserError(
            f"--profile {path} does not exist: copy {Path(__file__).parents[1]}/profiles/example.toml"
        ) from None
    except IsADirectoryError:
        raise UserError(f"--profile {path} is a folder: give a TOML file") from None
    except RecursionError:
        raise UserError(f"--profile {path} is not TOML: too many levels") from None
    except ValueError as error:  # no TOML, not UTF-8, or a number of thousands of digits
        raise UserError(f"--profile {path} is not TOML: {error}") from None
    try:
        profile: Profile = _from_table(Profile, values, "")
    except UserError as error:
        raise UserError(f"--profile {path}: {error}") from None
    return profile


def _from_table(cls: Any, values: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(hints)}"
            raise UserError(f"no field {where}{name}: {hint}")
    for given in dataclasses.fields(cls):
        needed = given.default is given.default_factory is dataclasses.MISSING
        if needed and given.name not in values:
            raise UserError(f"{where}{given.name} is missing")
    return cls(**{name: _value(hints[name], v, where + name) for name, v in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value`, checked and converted to the field's type."""
    if typing.get_origin(hint) is types.UnionType:  # X | None; TOML has no null
        hint = typing.get_args(hint)[0]
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _from_table(hint, value, where + ".")
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise UserError(f"{where} is {value!r}: it must be {' or '.join(typing.get_args(hint))}")
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_value(str, item, where) for item in value)
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        return {name: _value(str, item, f"{where}.{name}") for name, item in value.items()}
    if hint in (str, int, bool) and type(value) is hint:
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"{where} holds a NUL character, which no argument can")
        return value
    if where.startswith("environment"):  # it may be secret
        wanted = "a string" if "." in where else 'a table: [environment], then lines NAME = "VALUE"'
        raise UserError(f"{where} must be {wanted}")
    kinds = {str: "a string", int: "a whole number", bool: "true or false"}
    wanted = kinds.get(hint, "another kind of value")
    raise UserError(f"{where} is {value!r}: it must be {wanted} (see slurm/profiles/example.toml)")
