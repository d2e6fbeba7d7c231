"""Starts as many local ranks as a run needs, by torchrun, and starts them again after a crash."""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path
from types import FrameType

import psutil

from pretrain.config.train import TrainConfig
from pretrain.processes import STOP_SIGNALS
from pretrain.ranks import without_torchrun_options
from pretrain.run.ends import ENDS
from pretrain.run.folder import latest_checkpoint

logger = logging.getLogger(__name__)

STOPPED = 75
"""The exit status of a run that stopped in an orderly way. It is EX_TEMPFAIL: started again, it goes on."""

# After so many crashes without a new checkpoint in between, the next start would probably crash too.
_FRUITLESS_STARTS = 3


def local_ranks(config: TrainConfig, asked: int | None) -> int:
    """The number of ranks to start on this machine.

    It is `asked` where that is given, else the number of GPUs, else (on a CPU) as many as the model needs.
    """
    if asked is not None:
        return asked
    import torch

    return torch.cuda.device_count() or config.parallel.least_ranks


def become_torchrun(ranks: int, *target: str) -> None:
    """Replaces this process by torchrun, with `ranks` local ranks that run `target`."""
    command, environment = torchrun_command(ranks, *target)
    os.execve(sys.executable, command, environment)  # noqa: S606 (a list, no shell)


def torchrun_command(ranks: int, *target: str) -> tuple[list[str], dict[str, str]]:
    """torchrun's command line for `ranks` local ranks that run `target`, and its environment."""
    environment = without_torchrun_options(dict(os.environ))
    environment.setdefault("OMP_NUM_THREADS", "1")
    if target[0] == "--module":
        _import_nothing_from_here(environment)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={ranks}", *target], environment


def launch(argv: list[str], ranks: int, run_dir: Path) -> int:
    """Runs torchrun with `ranks` local processes of `python -m pretrain`; starts them again when one dies.

    Stop signals (stopping.py) are passed on to the ranks. torchrun's own restarts (`--max-restarts`) are
    not used: they ignore exit statuses, so they would start a run again that was asked to stop.

    Returns:
        The exit status: the ranks' own 0, 2 or 75; 128 + n after signal n; else that of a crashed rank.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    kept = without_torchrun_options(dict(os.environ))
    for name in set(os.environ) - set(kept):
        del os.environ[name]
    _import_nothing_from_here(os.environ)
    # Where this variable is not set, torchrun gives every rank one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # torchrun handles these signals; the others are handled below. Set by variables, since a version of
    # torch that does not know an option refuses it.
    for name in ("PET_SIGNALS_TO_HANDLE", "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        os.environ[name] = "SIGINT,SIGHUP,SIGQUIT"
    # torchrun logs a page of text for each failure.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
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
            # Ranks that fail alike say it once (run/ends.py). Their statuses come from torchrun.
            with tempfile.TemporaryDirectory(prefix="megatron-ladder-") as folder:
                os.environ[ENDS] = str(Path(folder) / "ends")
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
            logger.error("%d crashes without a new checkpoint: giving up", fruitless)
            return _crash_status(statuses)
        where = f"from {after.name}" if after else "from the start: there is no checkpoint yet"
        what = ", ".join(map(str, sorted(statuses)))
        # Not printed: on a full disk that would raise, and end the launcher as if it were a mistake.
        logger.warning("ranks ended with exit status %s: starting again %s", what, where)


def _import_nothing_from_here(environment: MutableMapping[str, str]) -> None:
    """Makes `python -m`, by which ranks start, not import what lies in the current folder: any torch.py."""
    is_checkout = Path.cwd() == Path(__file__).parents[2]  # not installed, it is found only there
    if not is_checkout:
        environment["PYTHONSAFEPATH"] = "1"


def _final_status(statuses: set[int], received: int) -> int | None:
    """The exit status that the command ends with; None: start the ranks again.

    Args:
        statuses: the ranks' exit statuses other than 0; -n: signal n killed the rank.
        received: the stop signal that was passed on to the ranks, or 0.
    """
    # One rank with such a status decides: the others may have failed only because it had ended.
    for decided in (2, STOPPED):
        if decided in statuses:
            return decided
    if 130 in statuses:  # Ctrl-C
        return 130
    return 128 + received if received else None


def _crash_status(statuses: set[int]) -> int:
    # When one rank has failed, torchrun ends the others by SIGTERM: that is not the status to report.
    first = min(statuses - {-signal.SIGTERM} or statuses)
    return 128 - first if first < 0 else first
