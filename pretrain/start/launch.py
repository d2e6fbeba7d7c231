"""From one command to as many local ranks as the run needs, by torchrun."""

import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import psutil

from pretrain.config.train import TrainConfig
from pretrain.processes import STOP_SIGNALS
from pretrain.run.folder import latest_checkpoint

STOPPED = 75
"""The exit status of a run that has stopped in good order: EX_TEMPFAIL, start it again and it goes on."""

# A crash is likely to come again when it came so often without a new checkpoint in between.
_FRUITLESS_STARTS = 3


def local_ranks(config: TrainConfig, asked: int | None) -> int:
    """Ranks to start on this machine: those asked for, one a GPU, or on a CPU one copy's worth."""
    if asked is not None:
        return asked
    import torch

    return torch.cuda.device_count() or config.parallel.model_parallel_size


def launch(argv: list[str], ranks: int, run_dir: Path) -> int:
    """Runs torchrun with `ranks` local processes of `python -m pretrain`, and again when one dies.

    Stop signals (stopping.py) are passed on to the ranks. torchrun's own restarts (`--max-restarts`) do
    not look at exit statuses: they would start a run again that was asked to stop.

    Returns:
        The exit status: the ranks' own 0, 2 or 75, 128 + n after signal n, else that of a crash.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun gives every rank one thread unless told otherwise.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # As variables, since a torch without one of the options refuses it: the other signals are ours.
    for name in ("PET_SIGNALS_TO_HANDLE", "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        os.environ[name] = "SIGINT,SIGHUP,SIGQUIT"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a page a failure
    received = 0

    def pass_on(number: int, _: FrameType | None) -> None:
        nonlocal received
        received = number
        children = psutil.Process().children()
        for rank in children:
            rank.send_signal(number)
        if not children:
            raise SignalException("no rank has started", signal.Signals(number))

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    fruitless = 0
    while True:
        before = latest_checkpoint(run_dir)
        options = ["--standalone", f"--nproc-per-node={ranks}", "--module", "pretrain"]
        try:
            torchrun.run(torchrun.parse_args([*options, *argv]))
            return 0
        except SignalException as ended:
            return STOPPED if ended.sigval in STOP_SIGNALS else 128 + ended.sigval
        except ChildFailedError as error:
            statuses = {failure.exitcode for failure in error.failures.values()}
        if (status := _final_status(statuses, received)) is not None:
            return status
        after = latest_checkpoint(run_dir)
        fruitless = fruitless + 1 if after == before else 1
        if fruitless == _FRUITLESS_STARTS:
            print(f"{fruitless} crashes without a new checkpoint: giving up", file=sys.stderr)
            return _crash_status(statuses)
        where = f"from {after.name}" if after else "from the start: there is no checkpoint yet"
        what = ", ".join(map(str, sorted(statuses)))
        print(f"ranks have ended with {what}: starting again {where}", file=sys.stderr)


def _final_status(statuses: set[int], received: int) -> int | None:
    """What the command ends with after these exit statuses of ranks; None: start them again.

    Args:
        statuses: those other than 0; -n is a death by signal n.
        received: the stop signal that was passed on to the ranks, or 0.
    """
    for decided in (2, STOPPED):  # the others may have failed because this one had gone
        if decided in statuses:
            return decided
    if 130 in statuses:  # Ctrl-C
        return 130
    return 128 + received if received else None


def _crash_status(statuses: set[int]) -> int:
    # torchrun ends the other ranks by SIGTERM when one has failed.
    first = min(statuses - {-signal.SIGTERM} or statuses)
    return 128 - first if first < 0 else first
