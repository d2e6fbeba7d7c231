"""From one command to as many local ranks as the run needs, by torchrun."""

import ctypes
import os
import signal
import subprocess
import sys

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


def launch(argv: list[str], ranks: int) -> int:
    """Runs `python -m pretrain` on `ranks` local processes; returns the exit status."""
    environment = dict(os.environ)
    # torchrun gives every rank one thread unless told otherwise.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={ranks}", "--module", "pretrain", *argv]
    process = subprocess.Popen(  # noqa: S603 (a list, no shell)
        command, env=environment, preexec_fn=die_with_parent
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        # The terminal sent the signal to the ranks too; let them end.
        return process.wait()
