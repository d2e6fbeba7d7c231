"""Ends a rank whose steps no longer end, when it has written down where it stands.

Collectives wait for their slowest rank, so when one hangs, all do: each rank's own watchdog notices, at
the same time, and no rank has to tell another. Whoever launched the ranks starts them again.

Stacks are Python's, by faulthandler; a GPU's collectives are from the recorder of torch's NCCL groups.
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
from pretrain.run.status import record_failure

logger = logging.getLogger(__name__)

FACTOR = 10.0
"""A step that takes so many times the median hangs."""
POLL_S = 1.0
GRACE_S = 5.0
"""Between a rank's stacks and its end, which ends the others: time for theirs."""
BACKSTOP_S = 60.0
"""A watchdog that does not run for so long: something keeps Python's lock, or its file's disk hangs."""


class Watchdog:
    """A thread beside the training, from `start` to the end of the `with`."""

    def __init__(self, config: TrainConfig) -> None:
        assert config.output_dir is not None
        self._run_dir = config.output_dir
        self._faults = config.faults
        self._rank = int(os.environ.get("RANK", "0"))
        self._step = 0
        self._usual_s = self._faults.hang_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.allow_more()

    def __enter__(self) -> Self:
        return self

    def start(self) -> None:
        """Steps are to begin. Not sooner: until then processes are forked."""
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
        """The next step may take as long as is usual, many times over."""
        self._step = step
        self._usual_s = max(self._faults.hang_s, FACTOR * median_s)
        self._expect(self._usual_s)

    def allow_more(self) -> None:
        """What comes is not a usual step: the first one, a validation, a checkpoint."""
        self._expect(max(self._faults.allowance_s, self._usual_s))

    def _expect(self, limit_s: float) -> None:
        now = time.monotonic()
        # Assigned at once: the thread reads it at any time.
        self._expected = (now, now + limit_s)

    def _watch(self) -> None:
        while not self._ended.wait(POLL_S):
            since, deadline = self._expected
            now = time.monotonic()
            if now >= deadline:
                self._end(now - since)
            # Set anew at each turn of this thread; it needs no lock of Python's and no disk.
            left = deadline - now + BACKSTOP_S
            faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__ or 2)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, waited_s: float) -> None:
        folder = self._run_dir / "hangs"
        what = f"no sign of step {self._step + 1} for {waited_s:.0f} s"
        logger.error("rank %d: %s: its stacks go to %s", self._rank, what, folder)
        # Whatever cannot be written, or is not in this torch: the rank must end.
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
    """The last collectives of this rank: which began, which ended."""
    from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]

    path.write_bytes(_dump_fr_trace_json())
