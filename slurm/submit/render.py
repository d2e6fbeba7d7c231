"""Renders batch scripts from templates. jinja's `finalize` quotes every value that a template inserts for
the shell, so no template can forget it.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from slurm.errors import UserError
from slurm.submit.chain import Array
from slurm.submit.profile import Profile


@dataclass(frozen=True)
class Resources:
    """What a job asks for besides the profile."""

    nodes: int
    """Nodes that ranks run on, without the spare ones."""
    ranks_per_node: int
    time: str | None = None
    """sbatch's: HH:MM:SS or D-HH:MM:SS."""
    spare_nodes: int = 0
    signal_lead: int = 120
    """Seconds from the signal to the time limit."""

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("ranks_per_node", 1), ("spare_nodes", 0)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise UserError(f"--{option} {getattr(self, name)}: it must be at least {least}")
        if not 1 <= self.signal_lead <= 65535:  # sbatch's bounds
            raise UserError(f"--signal-lead {self.signal_lead}: seconds, 1 to 65535")
        if self.limit_s is not None and self.limit_s <= self.signal_lead:
            raise UserError(
                f"--time {self.time} is not longer than --signal-lead {self.signal_lead} (seconds): the "
                "signal could not come before the end: give more time, or a shorter lead"
            )

    @property
    def limit_s(self) -> int | None:
        """`time` in seconds."""
        if self.time is None:
            return None
        match = re.fullmatch(r"(?:(\d+)-)?(\d{1,3}):([0-5]\d):([0-5]\d)", self.time)
        if not match:
            raise UserError(f"--time {self.time}: write HH:MM:SS, or D-HH:MM:SS")
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def train_script(
    profile: Profile, resources: Resources, arguments: list[str], run: Path, folder: Path
) -> str:
    """A training job's script.

    Args:
        arguments: those of `megatron-ladder train`.
        run: the run's folder.
        folder: the job's, where its log and history are.
    """
    local = profile.launcher == "local"
    ranks = resources.ranks_per_node
    # On one machine `train` starts its own ranks; under srun each is started as one.
    words = ["pretrain.cli", "train", "--nproc-per-node", str(ranks)] if local else ["pretrain"]
    return _render(
        "train.sh.jinja",
        profile,
        name=run,
        nodes=resources.nodes + resources.spare_nodes,
        spare_nodes=resources.spare_nodes,
        ranks_per_node=ranks,
        gpus=min(ranks, profile.gpus_per_node),
        time=resources.time,
        signal_lead=resources.signal_lead,
        words=[*words, *arguments],
        run=run,
        folder=folder,
    )


def task_script(
    profile: Profile,
    time: str | None,
    command: list[str],
    name: Path,
    folder: Path,
    *,
    gpus: int = 0,
    array: Array | None = None,
) -> str:
    """The script of any other command, which is one task.

    Args:
        command: what one types after `megatron-ladder`.
        folder: the job's.
        array: the job array whose tasks run the script.
    """
    return _render(
        "task.sh.jinja",
        profile,
        name=name,
        folder=folder,
        nodes=1,
        ranks_per_node=1,
        gpus=gpus,
        time=time,
        words=["pretrain.cli", *command],
        array=array,
    )


def environment_file(profile: Profile) -> str:
    """The profile's variables, for the shell that starts Python. They may be secret: only the user may read
    the file, and they are on no command line."""
    return "".join(f"export {name}={_quoted(v)}\n" for name, v in profile.environment.items())


def job_name(path: Path) -> str:
    """The name that squeue shows, of characters that every tool can show."""
    return "ladder-" + (re.sub(r"[^A-Za-z0-9_.-]", "_", path.name)[:40] or "job")


def _render(template: str, profile: Profile, *, name: Path, **values: Any) -> str:
    environment = jinja2.Environment(  # noqa: S701 (a shell script: `finalize` quotes)
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        finalize=_quoted,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",  # ${#array[@]} is bash
    )
    return environment.get_template(template).render(
        profile=profile,
        name=job_name(name),
        local=profile.launcher == "local",
        workdir=Path.cwd(),
        **values,
    )


def _quoted(value: Any) -> str:
    text = str(value)
    if "\0" in text:
        raise UserError("a value holds a NUL character, which no argument can")
    return shlex.quote(text)
