"""Ends a rank that hangs, after writing its stacks to a file.

Collectives wait for the slowest rank, so when one rank hangs, all do. The watchdog of each rank notices it
at the same time, and no rank has to tell another. The launcher starts the ranks again.

The stacks are Python's, written by faulthandler. On GPUs, the list of the last collectives is written too;
it comes from the flight recorder of torch's NCCL groups.
"""

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from pretrain.config.train import TrainConfig
from pretrain.ranks import rank_number
from pretrain.run.status import record_failure

logger = logging.getLogger(__name__)

FACTOR = 10.0
"""A step hangs when it takes so many times the median (and at least faults.hang_s)."""
POLL_S = 1.0
GRACE_S = 5.0
"""Seconds from writing a rank's stacks to its end. Its end also ends the other ranks, which need this time
to write theirs."""
BACKSTOP_S = 60.0
"""faulthandler ends the process when the watchdog has not done so in so many seconds after a deadline:
something holds Python's lock, or the disk of the stacks' file hangs."""


class Watchdog:
    """A thread that watches the training, from `start` to the end of the `with`."""

    def __init__(self, config: TrainConfig) -> None:
        assert config.output_dir is not None
        self._run_dir = config.output_dir
        self._faults = config.faults
        self._rank = rank_number()
        self._step = 0
        self._usual_s = self._faults.hang_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.allow_more()

    def __enter__(self) -> Self:
        return self

    def start(self) -> None:
        """Starts the thread; call it before the first step, but not while processes are still forked."""
        self.allow_more()
        if self._faults.hang_s:
            self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def step_ended(self, step: int, median_s: float) -> None:
        """Call it at the end of a step: the next one may take FACTOR times the median, or faults.hang_s."""
        self._step = step
        self._usual_s = max(self._faults.hang_s, FACTOR * median_s)
        self._expect(self._usual_s)

    def allow_more(self) -> None:
        """Call it before what may take longer than a step: the first step, a validation, a checkpoint."""
        self._expect(max(self._faults.allowance_s, self._usual_s))

    def _expect(self, limit_s: float) -> None:
        now = time.monotonic()
        # Both in one assignment, since the thread may read them at any time.
        self._expected = (now, now + limit_s)

    def _watch(self) -> None:
        while not self._ended.wait(POLL_S):
            since, deadline = self._expected
            now = time.monotonic()
            if now >= deadline:
                self._end(now - since)
            # faulthandler's own timer, set again at each turn of this thread. It needs neither Python's
            # lock nor a disk, so it also ends a process in which this thread cannot run.
            left = deadline - now + BACKSTOP_S
            faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__ or 2)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, waited_s: float) -> None:
        folder = self._run_dir / "hangs"
        what = f"no sign of step {self._step + 1} for {waited_s:.0f} s"
        logger.error("rank %d: %s: writing its stacks to %s", self._rank, what, folder)
        # The rank must end even if a file cannot be written, or this torch has no flight recorder.
        with contextlib.suppress(OSError, ImportError):
            folder.mkdir(exist_ok=True)
            name = f"step_{self._step + 1}.rank_{self._rank}"
            with (folder / f"{name}.txt").open("w") as file:
                file.write(f"rank {self._rank} on {os.uname().nodename}: {what}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            record_failure(self._run_dir, f"{what}: stacks in {folder}")
            if torch.cuda.is_available():
                _write_collectives(folder / f"{name}.nccl.json")
        time.sleep(GRACE_S)
        os._exit(1)


def _write_collectives(path: Path) -> None:
    """Writes the last collectives of this rank, with the state of each: begun or ended."""
    from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]

    path.write_bytes(_dump_fr_trace_json())
