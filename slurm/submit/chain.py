"""The words after `submit`'s options: commands, joined by `then`."""

from dataclasses import dataclass
from pathlib import Path

from slurm.errors import UserError

THEN = "then"
IN_TASKS = (("data", "tokenize"), ("index",))


@dataclass(frozen=True)
class Step:
    """One command of a chain."""

    command: tuple[str, ...]
    """What one types after `megatron-ladder`."""
    output: Path
    """The folder that it makes or works on; users give it to `status`, `logs` and `cancel`."""
    tasks: int | None = None
    """Only for commands of `IN_TASKS`: the tasks of the job array."""


def split_chain(words: list[str]) -> list[list[str]]:
    """The commands of a chain. Raises UserError when one is empty."""
    commands: list[list[str]] = [[]]
    for word in words:
        if word == THEN:
            commands.append([])
        else:
            commands[-1].append(word)
    if not all(commands):
        where = "before or after `then`" if len(commands) > 1 else "after submit's options"
        raise UserError(
            f"no command {where}: write what you would type after `megatron-ladder`, such as "
            "`submit --profile FILE train --preset debug ...`"
        )
    return commands


def take_tasks(command: list[str]) -> tuple[list[str], int | None]:
    """Takes `--tasks N`, an option of `submit`, out of a command of `IN_TASKS`; returns the command and N.

    Raises:
        UserError: N is no number, another command has --tasks, or --rank or --world-size are given too.
    """
    rest, tasks = [], None
    words = iter(command)
    for word in words:
        name, _, value = word.partition("=")
        # eval has a --tasks of its own.
        if name != "--tasks" or command[0] not in ("data", "index"):
            rest.append(word)
            continue
        value = value or next(words, "")
        if not value.isascii() or not value.isdigit() or int(value) < 1:
            raise UserError(f"--tasks {value}: give the number of tasks, 1 or more")
        tasks = int(value)
    if tasks is not None:
        if not any(command[: len(words)] == [*words] for words in IN_TASKS):
            cut = " and ".join(f"`{' '.join(words)}`" for words in IN_TASKS)
            raise UserError(
                f"--tasks: only {cut} are cut into tasks, not `{' '.join(command[:2])}`"
            )
        options = {word.partition("=")[0].replace("_", "-") for word in rest}
        if given := options & {"--rank", "--world-size"}:
            raise UserError(f"{', '.join(sorted(given))}: --tasks gives each task its own")
    return rest, tasks


@dataclass(frozen=True)
class Array:
    """Tasks of one job array; several arrays may share the work."""

    offset: int
    """The number of this array's first task, among all tasks."""
    count: int
    world_size: int
    """Tasks of all arrays."""


@dataclass(frozen=True)
class Part:
    """One job of the chain, or one job array."""

    command: tuple[str, ...]
    output: Path
    array: Array | None = None


def stages(steps: list[Step], max_array_size: int) -> list[list[Part]]:
    """The chain's jobs. The jobs of a stage run at the same time, after those of the stage before.

    A command with --tasks makes two stages: its arrays, and the command that joins their parts, which of
    `index` is itself. An array's tasks have numbers from 0 to below `max_array_size`: more tasks need
    several arrays.
    """
    result = []
    for step in steps:
        if step.tasks is None:
            result.append([Part(step.command, step.output)])
            continue
        offsets = range(0, step.tasks, max_array_size)
        arrays = [Array(o, min(max_array_size, step.tasks - o), step.tasks) for o in offsets]
        result.append([Part(step.command, step.output, array) for array in arrays])
        merge = ("data", "merge", str(step.output))
        result.append([Part(step.command if step.command[0] == "index" else merge, step.output)])
    return result
