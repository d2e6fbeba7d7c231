"""The rank of this process, also before torch.distributed has started.

torchrun sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each rank; the script of
`megatron-ladder submit` does so under srun. Some of them may also be left over in an environment.
"""

import logging
import os
from dataclasses import dataclass

from megatron_ladder.errors import UserError

logger = logging.getLogger(__name__)

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_SRUN = (
    "Under srun, RANK is SLURM_PROCID, LOCAL_RANK is SLURM_LOCALID and WORLD_SIZE is SLURM_NTASKS, for "
    "each task; `megatron-ladder submit` sets them so"
)


class RankError(UserError):
    """A mistake in one rank's variables. Each rank that finds one says it, not the first alone."""


@dataclass(frozen=True)
class Rank:
    """One of the ranks that torchrun or srun has started together."""

    number: int
    world_size: int
    local: int
    """Its number on its machine: the GPU that it uses."""


def launched_rank() -> Rank | None:
    """This process's rank; None when nobody has started several ranks: it is the only one.

    Raises:
        RankError: the environment has some of the variables but not all, or values that do not fit.
    """
    given = [name for name in NEEDED if os.environ.get(name)]
    if "RANK" not in given and "WORLD_SIZE" not in given:
        local_rank()
        return None
    missing = [name for name in NEEDED if name not in given]
    if missing:
        are = "are" if len(missing) > 1 else "is"
        srun = f" {_OF_SRUN}." if "SLURM_PROCID" in os.environ else ""
        raise RankError(
            f"the environment has {_and(given)}, but {_and(missing)} {are} not set: torchrun sets all four "
            f"for each rank.{srun} To start without torchrun: unset {' '.join(given)}; then the command "
            "starts the ranks of this machine itself"
        )
    size = _number("WORLD_SIZE", least=1)
    rank = Rank(_number("RANK", below=("WORLD_SIZE", size)), size, local_rank())
    if not 1 <= _number("MASTER_PORT") <= 65535:
        raise RankError(
            f"MASTER_PORT is {os.environ['MASTER_PORT']} in the environment: give 1 to 65535"
        )
    tasks, task = os.environ.get("SLURM_STEP_NUM_TASKS"), os.environ.get("SLURM_PROCID")
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if tasks == str(size) != "1" and task != str(rank.number) and not by_torchrun:
        raise RankError(
            f"RANK is {rank.number}, but srun has started this process as task {task} of {tasks}: several "
            f"ranks would have one number. {_OF_SRUN}"
        )
    return rank


def local_rank() -> int:
    """This process's number among the ranks of its machine; 0 when it is the only one."""
    if not os.environ.get("LOCAL_RANK"):
        return 0
    size = os.environ.get("LOCAL_WORLD_SIZE")
    return _number(
        "LOCAL_RANK", below=("LOCAL_WORLD_SIZE", _number("LOCAL_WORLD_SIZE")) if size else None
    )


def why_several() -> str:
    """A sentence for a process that meets another one of the same command, where srun has started both."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or launched_rank():
        return ""
    return f". srun has started {tasks} tasks, each a run of its own: RANK is not set. {_OF_SRUN}"


def is_first_rank() -> bool:
    """Whether this process is rank 0, which logs and writes files for all ranks.

    So is a process that is the only rank, and one whose variables are wrong: it says so.
    """
    try:
        rank = launched_rank()
    except RankError:
        return True
    return rank is None or rank.number == 0


def rank_number() -> int:
    """This process's rank; 0 when it is the only one."""
    rank = launched_rank()
    return rank.number if rank else 0


def world_size() -> int:
    """The number of ranks of which this process is one."""
    rank = launched_rank()
    return rank.world_size if rank else 1


def check_gpus(ranks: int, option: str) -> None:
    """Refuses to start more ranks than this machine has GPUs. On a CPU there may be any number.

    Args:
        ranks: to start on this machine.
        option: what asked for them, for the message.
    """
    import torch  # imported here, because the command line starts without torch

    if 0 < torch.cuda.device_count() < ranks:
        raise UserError(
            f"{option} {ranks}: this machine has {_gpus()}, and each rank needs one of its own"
        )


def take_gpu() -> None:
    """Makes this rank's GPU the current one.

    Raises:
        RankError: this rank has none of its own.
    """
    import torch

    local, count = local_rank(), torch.cuda.device_count()
    if local >= count:
        raise RankError(
            f"LOCAL_RANK is {local}, but this process sees {_gpus()}, and each rank needs one of its own. "
            "Start fewer ranks on a machine. Or let each process see all GPUs of its machine (srun "
            "--gpu-bind=none, no CUDA_VISIBLE_DEVICES)"
        )
    if not os.environ.get("LOCAL_RANK") and world_size() > 1 and count > 1:
        raise RankError(
            f"LOCAL_RANK is not set, and this process sees {_gpus()}: all ranks of this machine would use "
            "the first. Set LOCAL_RANK for each rank"
        )
    torch.cuda.set_device(local)


def _gpus() -> str:
    import torch

    count = torch.cuda.device_count()
    return "1 GPU" if count == 1 else f"{count} GPUs"


def without_torchrun_options(environment: dict[str, str]) -> dict[str, str]:
    """`environment` without PET_*: torchrun would read its options from them, such as how many machines to
    wait for. Says what is left out."""
    left_out = sorted(name for name in environment if name.startswith("PET_"))
    if left_out:
        logger.warning(
            "%s in the environment: not used, as this command starts ranks on this machine only. On "
            "several machines start it by torchrun or `megatron-ladder submit`",
            ", ".join(left_out),
        )
    return {name: value for name, value in environment.items() if name not in left_out}


def _number(name: str, least: int = 0, below: tuple[str, int] | None = None) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise RankError(
            f"{name} is {text!r} in the environment: it must be a number, {least} or more"
        )
    if below and int(text) >= below[1]:
        raise RankError(
            f"{name} is {text} in the environment, and {below[0]} is {below[1]}: ranks have numbers from 0 "
            f"to {below[1] - 1}"
        )
    return int(text)


def _and(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
