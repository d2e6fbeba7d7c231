"""Which commands measure and export a checkpoint, and what they run on."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pretrain.config.train import TrainConfig
from pretrain.config.watch import OFFLINE
from pretrain.data.folders import DataFolder
from pretrain.ranks import NEEDED
from pretrain.run.ends import ENDS

MOST_THREADS = 16
"""Of one measurement: more cores hardly make a few sequences at a time faster."""
# What makes a process a rank, or that of a launcher.
_OF_RANKS = (*NEEDED, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", ENDS)


def eval_arguments(
    config: TrainConfig, folders: Sequence[DataFolder], checkpoint: Path, output_dir: Path
) -> list[str]:
    """The command line of `eval`, after `megatron-ladder`.

    Args:
        folders: the run's data sets.
    """
    watch = config.watch
    arguments = ["eval", str(checkpoint), "--output-dir", str(output_dir), "--tasks", *watch.tasks]
    if data := measured_on(config, folders):
        arguments += ["--data", *map(str, data)]
    arguments += ["--max-tokens", str(watch.max_tokens)]
    if watch.limit is not None:
        arguments += ["--limit", str(watch.limit)]
    if watch.include_path is not None:
        arguments += ["--include-path", str(watch.include_path)]
    return arguments


def measured_on(config: TrainConfig, folders: Sequence[DataFolder]) -> list[Path]:
    """The data sets of the tasks that are made of some: those of the run that have a validation split, if
    config.watch.data names no others. [] where there is no such task."""
    if not set(OFFLINE).intersection(config.watch.tasks):
        return []
    held_out = [folder.path for folder in folders if folder.tokens("validation")]
    return list(config.watch.data) or held_out


def export_arguments(checkpoint: Path, output_dir: Path) -> list[str]:
    """The command line of `export`, after `megatron-ladder`."""
    return ["export", str(checkpoint), str(output_dir)]


def beside(arguments: list[str], *, nice: int) -> list[str]:
    """The words that run such a command below this process, with a priority."""
    # As this process was started: whether modules in the current folder may hide installed ones.
    python = [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m"]
    command = [*python, "pretrain.cli", *arguments]
    return [*python, "pretrain.watch.child", str(os.getpid()), str(nice), *command]


def environment(*, alone: bool) -> dict[str, str]:
    """The variables of such a command: it is no rank, and sees no GPU.

    Args:
        alone: the ranks have trained their last step. Before, it gets the cores alone that they leave.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads(alone=alone))}


def threads(*, alone: bool) -> int:
    """The cores that this process may use, without those of the ranks beside it that train; at least 1.

    A rank on a GPU keeps one core busy, a rank on the CPU as many as it has threads. Under srun each rank
    may use its own cores alone, and says nothing of others.
    """
    cores = len(os.sched_getaffinity(0))
    ranks = 0 if alone else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    of_a_rank = 1 if torch.cuda.is_available() else torch.get_num_threads()
    return max(1, min(cores - ranks * of_a_rank, MOST_THREADS))
