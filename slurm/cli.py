"""`megatron-ladder submit`, `status`, `logs` and `cancel`: options in, exit status out.

What `submit` submits is checked by pretrain/commands/submit.py, which knows the other commands.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from slurm.errors import UserError
from slurm.submit.chain import split_chain
from slurm.submit.placement import Placement
from slurm.watch.cancel import cancel
from slurm.watch.logs import show_logs
from slurm.watch.status import status


@dataclass(frozen=True, kw_only=True)
class Submit(Placement):
    """Submit COMMAND, what one types after `megatron-ladder`, to SLURM.

    `then` between two commands makes the second wait for the first: submit --profile P data tokenize ...
    --tasks 8 then train ... then export RUN OUT

    Options that are also fields of the profile (--exclude, --reservation, ...) win over it.
    """

    profile: Path
    """The cluster: a TOML file. slurm/profiles/example.toml has every field."""
    nodes: int = 1
    """Of a training."""
    ranks_per_node: int | None = None
    """Of a training; None: one a GPU (gpus_per_node), or 1."""
    time: str | None = None
    """Each job's limit, HH:MM:SS or D-HH:MM:SS; None: the partition's. A training goes on after it."""
    spare_nodes: int = 0
    """Nodes of a training that stand in for those that fail."""
    signal_lead: int = 120
    """Seconds before the limit at which a training saves and queues itself again."""
    after: str | None = None
    """A job's id that must have succeeded first."""
    dry_run: bool = False
    """Print the scripts and submit nothing."""
    estimate: bool = False
    """Say what the chain's trainings will take (hours, GPU-hours, jobs, storage) and submit nothing."""
    device: str = "h100"
    """With --estimate: the GPU, by name."""
    mfu: float | None = None
    """With --estimate: the share of the GPUs' peak that is reached; None: the planner models it."""


@dataclass(frozen=True)
class Status:
    """Say how runs, and data sets and models being made, stand."""

    outputs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that submitted commands make: of a run, a data set, an export."""


@dataclass(frozen=True)
class Logs:
    """Print what the newest job of a run wrote."""

    output: tyro.conf.Positional[Path]
    """The folder that a submitted command makes."""
    follow: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Go on until the job is over."""


@dataclass(frozen=True)
class Cancel:
    """End jobs that are queued or run; a training saves a checkpoint first."""

    outputs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that submitted commands make."""
    now: bool = False
    """At once, without a checkpoint."""


def parse_submit(argv: list[str]) -> tuple[Submit, list[list[str]]]:
    """submit's own options, and the commands after them.

    Raises:
        UserError: there is no command.
        SystemExit: `--help`, or an option that does not exist (tyro prints it and what is near).
    """
    end = 0
    while end < len(argv) and argv[end].startswith("-"):
        flags = ("--dry-run", "--estimate", "--exclusive")
        takes_value = "=" not in argv[end] and argv[end].replace("_", "-") not in flags
        end += 2 if takes_value and argv[end] not in ("-h", "--help") else 1
    config = (tyro.conf.FlagCreatePairsOff,)
    options = tyro.cli(Submit, args=argv[:end], prog="megatron-ladder submit", config=config)
    if options.after is not None and not (options.after.isascii() and options.after.isdigit()):
        raise UserError(f"--after {options.after}: give a job's number")
    return options, split_chain(argv[end:])


def main(name: str, argv: list[str]) -> int:
    """Runs `status`, `logs` or `cancel`; returns its exit status. 2: a user's mistake."""
    command: Any = {"status": Status, "logs": Logs, "cancel": Cancel}[name]
    config = (tyro.conf.FlagCreatePairsOff,)
    try:
        options = tyro.cli(command, args=argv, prog=f"megatron-ladder {name}", config=config)
        match options:
            case Status():
                print(status([path.absolute() for path in _some(options.outputs)]))
            case Logs():
                show_logs(options.output.absolute(), follow=options.follow)
            case Cancel():
                for output in _some(options.outputs):
                    print("\n".join(cancel(output.absolute(), now=options.now)))
        return 0
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # data_prep/broken_pipe.py
        raise
    except OSError as error:
        message = f"{error.filename or 'the operating system'}: {error.strerror or error}"
    except KeyboardInterrupt:
        return 130
    print(f"megatron-ladder {name}: {message}", file=sys.stderr)
    return 2


def _some(outputs: tuple[Path, ...]) -> tuple[Path, ...]:
    if not outputs:
        raise UserError("give the folder of a run, a data set or an export")
    return outputs
