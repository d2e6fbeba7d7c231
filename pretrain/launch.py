"""From one command to as many local ranks as the run needs, by torchrun."""

import ctypes
import os
import signal
import sys
from typing import NoReturn

from pretrain.config import TrainConfig


def local_ranks(config: TrainConfig, asked: int | None) -> int:
    """Ranks to start on this machine: those asked for, one a GPU, or on a CPU one copy's worth."""
    if asked is not None:
        return asked
    import torch

    return torch.cuda.device_count() or config.parallel.model_parallel_size


def die_with_parent() -> None:
    """Asks Linux to end this process when its parent ends, however that ends.

    A rank that outlived a killed launcher would go on writing to a run that has been started again.
    """
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def launch(argv: list[str], ranks: int) -> NoReturn:
    """Becomes torchrun with `ranks` local processes of `python -m pretrain`."""
    environment = dict(os.environ)
    # torchrun gives every rank one thread unless told otherwise.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={ranks}", "--module", "pretrain", *argv]
    os.execve(sys.executable, command, environment)  # noqa: S606 (a list, no shell)
