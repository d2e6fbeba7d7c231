"""What a run is doing, for people and monitors: RUN/status.json, RUN/metrics.prom, RUN/starts.jsonl.

The first rank writes these files; another rank only writes to status.json that it failed. A rank that fails
before the first one has written leaves a file (ends.py), which the first one reads.
docs/reference/formats.md describes the files. Training makes no decision from them, because the clock and
the host's name in them may be wrong.
"""

import contextlib
import json
import logging
import math
import os
import socket
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from megatron_ladder.errors import UserError
from megatron_ladder.json_files import in_words, parse_json, read_json
from pretrain.config.train import TrainConfig
from pretrain.files import write_atomically
from pretrain.ranks import is_first_rank, rank_number, world_size
from pretrain.run.ends import ENDS, first_cause, is_watched
from pretrain.run.lines import is_start, is_status
from pretrain.run.prometheus import device_figures, prometheus_text

logger = logging.getLogger(__name__)

State = Literal[
    "starting", "training", "validating", "saving", "measuring", "stopped", "finished", "failed"
]
ENDED = ("stopped", "finished", "failed")

INTERVAL_S = 1.0
"""The shortest time between two writes in the same state."""


class Status:
    """The status of this start of a run. As a context manager it records a failure of the code inside.

    Every rank makes one, after the first rank has taken the run's lock. The first rank writes in a thread,
    so that training does not wait for the disk. A slow disk gets the newest status and not all.
    """

    def __init__(self, config: TrainConfig) -> None:
        assert config.output_dir is not None
        self._run_dir = config.output_dir
        self._tokens_after = config.tokens_after
        self._changed = -math.inf
        self._newest: deque[dict[str, Any]] = deque(maxlen=1)  # the thread has not written it yet
        self._thread = ThreadPoolExecutor(1, "status")
        self._facts: dict[str, Any] = {
            "state": "starting",
            "phase": "",
            "step": 0,
            "train_steps": config.train_steps,
            "tokens": 0,
            "loss": None,
            "tokens_per_second": None,
            "eta_s": None,
            "last_checkpoint": None,
            "watch": "",
            "starts": 1,
            "reason": "",
            "unix_time": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "world_size": world_size(),
            "job_id": os.environ.get("SLURM_JOB_ID"),
            "ends": os.environ.get(ENDS),
        }
        if is_first_rank():
            self._note_start()
            self.update("starting")

    def __enter__(self) -> Self:
        if is_first_rank() and (cause := first_cause("")):  # failed while this one was starting
            self.wait()
            record_failure(self._run_dir, cause)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.update("stopped", reason="interrupted")
        self._thread.shutdown()
        # Of ranks that leave files, the first of those that fail alike records it (commands/users.py).
        # Checkpoints that cannot be written end a run by SystemExit, with a sentence on the first rank.
        says_why = isinstance(error, UserError) or (
            isinstance(error, SystemExit) and isinstance(error.code, str)
        )
        if (says_why or isinstance(error, Exception)) and (is_first_rank() or not is_watched()):
            what = "" if says_why else f"{type(error).__name__}: "
            record_failure(self._run_dir, first_cause(what + str(error)))

    def begin(self, step: int, last_checkpoint: int | None) -> None:
        """Records that training begins, or is resumed, after `step`."""
        if is_first_rank():
            _append(self._run_dir, {"kind": "train", "unix_time": time.time(), "step": step})
        tokens = self._tokens_after(step)
        facts = {"step": step, "tokens": tokens, "last_checkpoint": last_checkpoint}
        self.update("training", phase="", **facts)

    def update(self, state: State | None = None, **facts: Any) -> None:
        """Updates the status. The thread gets it at once when the state, the phase of the start or the
        newest checkpoint changes, otherwise at most once a second.

        Args:
            state: the new state; None keeps it.
            facts: other fields of status.json that have changed.
        """
        if not is_first_rank():
            return
        now = time.monotonic()
        important = {"last_checkpoint", "phase"} & {*facts}
        changed = state not in (None, self._facts["state"]) or important
        self._facts |= facts
        if state is not None:
            self._facts["state"] = state
        if changed or now - self._changed >= INTERVAL_S:
            self._changed = now
            # The time of the news, not of its writing: of a rank that hangs nothing newer is written.
            self._facts["unix_time"] = time.time()
            self._newest.append(dict(self._facts))
            self._thread.submit(self._write)

    def wait(self) -> None:
        """Waits until the thread has written the newest status."""
        self._thread.submit(self._write).result()

    def _write(self) -> None:
        try:
            facts = self._newest.popleft()
        except IndexError:  # while an older one was written, this one has been written too
            return
        text = prometheus_text(self._run_dir.name, facts, device_figures())
        try:
            if not self._has_failed(facts):
                write_atomically(self._run_dir / "status.json", json.dumps(facts) + "\n")
                write_atomically(self._run_dir / "metrics.prom", text)
        except OSError as error:  # the run must continue
            logger.warning("%s: the run's status could not be written: %s", self._run_dir, error)

    def _has_failed(self, facts: dict[str, Any]) -> bool:
        """Whether another rank has written that it failed, which is to stay."""
        written = read_status(self._run_dir) or {}
        same = all(written.get(name) == facts[name] for name in ("host", "pid", "starts"))
        return same and written["state"] == "failed"

    def _note_start(self) -> None:
        """Adds this start, and how the start before it ended, to RUN/starts.jsonl."""
        starts = [line for line in read_starts(self._run_dir) if line["kind"] == "start"]
        self._facts["starts"] = len(starts) + 1
        line = {
            name: self._facts[name] for name in ("unix_time", "host", "pid", "world_size", "job_id")
        }
        before = read_status(self._run_dir) if starts else None
        if before:
            before = {name: before[name] for name in ("state", "step", "unix_time", "reason")}
            if before["state"] not in ENDED:
                before["reason"] = f"killed while {before['state']}"
            end = in_words(before["reason"] or before["state"])
            logger.info("The previous start ended at step %d: %s", before["step"], end)
        _append(self._run_dir, {"kind": "start", **line, "before": before})


def record_failure(run_dir: Path, reason: str) -> None:
    """Sets the run's state to "failed", unless it is that already. Any rank may call this at any time.

    Does nothing when the status is that of another start: the one before, or one that holds the run's lock
    now.
    """
    status = read_status(run_dir)
    if status is None or status["state"] == "failed" or status.get("ends") != os.environ.get(ENDS):
        return
    rank = rank_number()
    status |= {"state": "failed", "reason": reason, "unix_time": time.time()}
    # Several ranks may fail at the same time: each writes its own file, and the last rename wins. OSErrors
    # are ignored, because the disk may be the reason of the failure.
    with contextlib.suppress(OSError):
        mine = run_dir / f"status.rank_{rank}.json"
        write_atomically(mine, json.dumps(status) + "\n")
        mine.replace(run_dir / "status.json")


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """The fields of RUN/status.json; None when it does not exist or cannot be read."""
    try:
        status = read_json(run_dir / "status.json", "a run's status")
    except (OSError, UserError):
        return None
    return status if is_status(status) else None


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of RUN/starts.jsonl, except incomplete ones, left by a kill; [] without the file."""
    path = run_dir / "starts.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    found = []
    for line in lines:
        with contextlib.suppress(UserError):
            if is_start(start := parse_json(line.encode(), "a line")):
                found.append(start)
    return found


def _append(run_dir: Path, line: dict[str, Any]) -> None:
    """Adds a line to RUN/starts.jsonl. After an incomplete line, it starts on a new one."""
    path = run_dir / "starts.jsonl"
    whole = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a") as file:
        file.write(("" if whole else "\n") + json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
