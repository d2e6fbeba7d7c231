"""From one command to as many local ranks as the run needs, by torchrun."""

import os
import subprocess
import sys

from pretrain.config import TrainConfig


def local_ranks(config: TrainConfig, asked: int | None) -> int:
    """Ranks to start on this machine: those asked for, one a GPU, or on a CPU one copy's worth."""
    if asked is not None:
        return asked
    import torch

    return torch.cuda.device_count() or config.parallel.model_parallel_size


def launch(argv: list[str], ranks: int) -> int:
    """Runs `python -m pretrain` on `ranks` local processes; returns the exit status."""
    environment = dict(os.environ)
    # torchrun gives every rank one thread unless told otherwise.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={ranks}", "--module", "pretrain", *argv]
    process = subprocess.Popen(command, env=environment)  # noqa: S603 (a list, no shell)
    try:
        return process.wait()
    except KeyboardInterrupt:
        # The terminal sent the signal to the ranks too; let them end.
        return process.wait()
