"""`megatron-ladder index`."""

import argparse

from megatron_ladder.errors import UserError
from pretrain.commands.users import for_users
from pretrain.config.train import TrainConfig
from pretrain.start.arguments import parse_train

HELP = """usage: megatron-ladder index [--rank N --world-size N] OPTIONS OF train

Make a run's index files before it trains, as a job of its own: on one machine without GPUs, with all of its
cores, or as a job array. They say which documents each training sequence holds. `train` with the same
options finds them, and starts at once; without this command, its first rank makes them while it starts.

Give the options of the training: --preset or --config, --data.paths, --output-dir and so on. The layout and
the number of ranks do not matter. What is made is not made again, whatever ended the command.

On a cluster: megatron-ladder submit --profile P index OPTIONS --tasks 16 then train OPTIONS

  --rank N          of a job array's task, from 0: make its share of the files. When all have, the command
                    without --rank makes what needs all of them; `submit` puts it behind the array
  --world-size N    tasks of the job array
"""


@for_users
def index(argv: list[str]) -> int:
    """Makes index files."""
    if {"-h", "--help"} & set(argv):
        print(HELP, end="")
        return 0
    config, rank, world_size = parse_index(argv)
    from pretrain.start.index_before import index_before

    print(index_before(config, rank, world_size))
    return 0


def parse_index(argv: list[str]) -> tuple[TrainConfig, int | None, int]:
    """The training's configuration, and a task's number (None: there is no array) of how many.

    Raises:
        UserError: numbers that are none, or an option of `train` that says nothing about data.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--rank")
    own.add_argument("--world-size", "--world_size")
    chosen, rest = own.parse_known_args(argv)
    for option in ("--nproc-per-node", "--plan-only"):
        if any(word.split("=")[0] == option for word in rest):
            raise UserError(f"{option} is of `train`: index files do not depend on it")
    numbers = []
    for name in ("rank", "world_size"):
        text = getattr(chosen, name)
        if text is not None and not (text.isascii() and text.isdigit()):
            raise UserError(f"--{name.replace('_', '-')} {text}: give a number")
        numbers.append(None if text is None else int(text))
    rank, world_size = numbers
    if (rank is None) != (world_size is None):
        raise UserError("give both --rank and --world-size, or neither")
    if rank is not None and world_size is not None and rank >= world_size:
        raise UserError(
            f"--rank {rank} is not one of --world-size {world_size}: ranks count from 0"
        )
    config, _ = parse_train(rest)
    return config, rank, world_size or 1
