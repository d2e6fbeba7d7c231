"""Ends a rank that hangs, after writing its stacks to a file.

Collectives wait for the slowest rank, so when one rank hangs, all do. The watchdog of each rank notices it
at the same time, and no rank has to tell another. The launcher starts the ranks again.

It watches from the first second of a process on. A start has phases, whose names its messages have; then
come steps.

The stacks are Python's, written by faulthandler. On GPUs, the list of the last collectives is written too;
it comes from the flight recorder of torch's NCCL groups.
"""

import contextlib
import faulthandler
import logging
import math
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from pretrain.config.faults import FaultConfig
from pretrain.config.train import TrainConfig
from pretrain.ranks import RankError, is_first_rank, rank_number
from pretrain.run.ends import leave
from pretrain.run.status import record_failure

logger = logging.getLogger(__name__)

FACTOR = 10.0
"""A step hangs when it takes so many times the median (and at least faults.hang_s)."""
POLL_S = 1.0
SAY_EVERY_S = 60.0
"""A start that takes longer says so often how far it is."""
GRACE_S = 5.0
"""Seconds from writing a rank's stacks to its end. Its end also ends the other ranks, which need this time
to write theirs."""
BACKSTOP_S = 60.0
"""faulthandler ends the process when the watchdog has not done so in so many seconds after a deadline:
something holds Python's lock, or the disk of the stacks' file hangs."""


class Watchdog:
    """A thread that watches this rank, from the beginning to the end of the `with`."""

    def __init__(self) -> None:
        self._run_dir: Path | None = None
        self._faults = FaultConfig()
        self._step = 0
        self._phase = "importing the libraries"
        self._since = self._said = time.monotonic()
        self._usual_s = math.inf
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.progress()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Watches no more."""
        self._ended.set()
        self._thread.join()

    def know(self, config: TrainConfig) -> None:
        """Call it as soon as the run's configuration is known. Before, its defaults count."""
        self._run_dir, self._faults = config.output_dir, config.faults
        self._usual_s = self._faults.hang_s or math.inf
        self.progress()

    def phase(self, name: str) -> None:
        """Call it when a phase of the start begins. It may take faults.start_s, and so long again after
        each `progress`.

        Args:
            name: what the rank does, for messages: "reading the checkpoint".
        """
        self._phase = name
        self.progress()

    def progress(self, words: str = "") -> None:
        """Call it when a phase of the start goes on.

        Args:
            words: how far it is.
        """
        self._phase = words or self._phase
        self._expect(self._faults.start_s or math.inf)

    def step_ended(self, step: int, median_s: float) -> None:
        """Call it at the end of a step: the next one may take FACTOR times the median, or faults.hang_s."""
        self._step, self._phase = step, ""
        self._usual_s = max(self._faults.hang_s, FACTOR * median_s)
        self._expect(self._usual_s if self._faults.hang_s else math.inf)

    def allow_more(self) -> None:
        """Call it before what may take longer than a step: a validation, a checkpoint."""
        if self._phase:  # before the first step
            self.progress()
        else:
            more = max(self._faults.allowance_s, self._usual_s)
            self._expect(more if self._faults.hang_s else math.inf)

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
            if self._phase and now >= self._said + SAY_EVERY_S and is_first_rank():
                self._said = now
                logger.info("starting for %.0f s: %s", now - self._since, self._phase)
            if deadline < math.inf:
                # faulthandler's own timer, set again at each turn of this thread. It needs neither Python's
                # lock nor a disk, so it also ends a process in which this thread cannot run.
                left = deadline - now + BACKSTOP_S
                faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__ or 2)
            else:
                faulthandler.cancel_dump_traceback_later()
        faulthandler.cancel_dump_traceback_later()

    def _end(self, waited_s: float) -> None:
        rank = _rank()
        if phase := self._phase:
            what = f"the start hangs at {phase}: no progress for {waited_s:.0f} s (faults.start_s)"
        else:
            what = f"no sign of step {self._step + 1} for {waited_s:.0f} s"
        folder = self._run_dir and self._run_dir / "hangs"
        where = folder or "standard error, as the run's folder is not known yet"
        # All ranks hang at the same time, and write their stacks. One of them says so.
        if says := leave(1, what):
            logger.error("rank %d: %s: writing its stacks to %s", rank, what, where)
        written = False
        # The rank must end even if a file cannot be written, or this torch has no flight recorder.
        with contextlib.suppress(OSError, ImportError):
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
                name = f"{'start' if phase else f'step_{self._step + 1}'}.rank_{rank}"
                with (folder / f"{name}.txt").open("w") as file:
                    file.write(f"rank {rank} on {os.uname().nodename}: {what}\n\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
                written = True
                if says:
                    record_failure(folder.parent, f"{what}: stacks in {folder}")
                # Not imported here: the imports may be what hangs.
                torch = sys.modules.get("torch")
                if torch and torch.cuda.is_available():
                    _write_collectives(folder / f"{name}.nccl.json")
        if not written:
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        time.sleep(GRACE_S)
        os._exit(1)


def _rank() -> int:
    try:
        return rank_number()
    except RankError:  # said elsewhere
        return 0


def _write_collectives(path: Path) -> None:
    """Writes the last collectives of this rank, with the state of each: begun or ended."""
    from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]

    path.write_bytes(_dump_fr_trace_json())
