"""Trains the runs of a sweep on this machine, one after another.

Each run is a process of its own, so a crash or a run that diverges ends that run alone. The processes are
forked from one that has imported torch and megatron-core (multiprocessing's forkserver): small runs would
take longer to import than to train.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from pretrain.processes import STOP_SIGNALS
from pretrain.run.status import read_status
from pretrain.start.launch import STOPPED
from pretrain.sweep.checks import CheckedRun
from pretrain.sweep.folder import LOGS, log_file, train_command
from pretrain.sweep.results import last_loss
from pretrain.sweep.table import Sample, finished_samples, in_time, seconds_of

Train = Callable[[list[str]], int]

START = "forkserver"
LOOK_S, PATIENCE_S = 0.5, 10.0


def train_in_turn(runs: list[CheckedRun], folder: Path, train: Train) -> int:
    """Trains every run that is not done.

    Args:
        folder: the sweep's; what a run prints goes to FOLDER/logs/NAME.log.
        train: the command `train`: argv in, exit status out.

    Returns:
        0; 1 where runs have failed (the others are trained all the same); 75 after a stop signal, when the
        run that was training has saved a checkpoint.
    """
    left = [run for run in runs if run.state != "done"]
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    samples = finished_samples(runs)
    context: Any = multiprocessing.get_context(START)
    context.set_forkserver_preload(["pretrain.sweep.imported"])
    failed = []
    with _Stopping() as stopping:
        for number, run in enumerate(left, start=1):
            name, began = run.plan.name, time.monotonic()
            log = log_file(folder, name)
            argv = train_command(folder, name)[1:]
            process = context.Process(target=_child, args=(train, argv, log))
            title = f"[{number} of {len(left)}] {name}"
            status = _watched(process, stopping, title, run)
            if stopping.number:
                print(f"{title}: stopped; the same command goes on from here", flush=True)
                return STOPPED
            took = time.monotonic() - began
            if status:
                failed.append(name)
                print(f"{title}: {_why(run, status)}; see {log}", flush=True)
                continue
            if run.state == "new":
                samples.append((run.work, took))
            print(
                f"{title}: {_loss(run)} | {in_time(took)}{_to_go(left[number:], samples)}",
                flush=True,
            )
    if failed:
        print(f"{len(failed)} of {len(left)} runs failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


def _watched(process: Any, stopping: "_Stopping", title: str, run: CheckedRun) -> int:
    """Runs a process to its end, and shows its steps on a terminal. Returns its exit status."""
    assert run.plan.config.output_dir is not None
    steps = run.config.train_steps
    process.start()
    stopping.watch(process)
    with tqdm(total=steps, desc=title, unit="step", leave=False, disable=None) as bar:
        try:
            while process.is_alive():
                process.join(LOOK_S)
                if not bar.disable and (status := read_status(run.plan.config.output_dir)):
                    bar.update(min(steps, status["step"]) - bar.n)
        except KeyboardInterrupt:
            process.join(PATIENCE_S)  # Ctrl-C on a terminal is for the run too
            if process.is_alive():
                os.kill(process.pid, signal.SIGTERM)
                process.join()
            raise
        finally:
            stopping.process = None
    return int(process.exitcode or 0)


class _Stopping:
    """Passes stop signals on to the run that trains. It ends with a checkpoint, and the sweep after it."""

    def __init__(self) -> None:
        self.number = 0
        self.process: Any = None

    def __enter__(self) -> "_Stopping":
        self._before = {n: signal.signal(n, self._pass_on) for n in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def watch(self, process: Any) -> None:
        """From now on signals are this process's; one that came while it was starting is too."""
        self.process = process
        if self.number:
            os.kill(process.pid, self.number)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self.number = number
        if self.process is not None:
            os.kill(self.process.pid, number)


def _child(train: Train, argv: list[str], log: Path) -> None:
    """A run's process: `train`, which prints into the log."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    sys.exit(train(argv))


def _end_with_the_sweep() -> None:
    """Stops the run in good order where the sweep's own process has been killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    logging.getLogger(__name__).error("the sweep has ended: this run stops")
    os.kill(os.getpid(), signal.SIGTERM)


def _loss(run: CheckedRun) -> str:
    assert run.plan.config.output_dir is not None
    loss = last_loss(run.plan.config.output_dir)
    return "no loss" if loss is None else f"loss {loss:.4f}"


def _why(run: CheckedRun, status: int) -> str:
    assert run.plan.config.output_dir is not None
    said = (read_status(run.plan.config.output_dir) or {}).get("reason")
    ended = f"was ended by signal {-status}" if status < 0 else f"ended with exit status {status}"
    return f"{ended}: {said}" if said else ended


def _to_go(left: list[CheckedRun], samples: list[Sample]) -> str:
    seconds = sum(seconds_of(run.work, samples) or 0.0 for run in left)
    return f" | about {in_time(seconds)} to go" if left else ""
