"""`megatron-ladder logs`: what the newest job of a run wrote."""

import os
import sys
import time
from pathlib import Path

from slurm.jobs.folders import log_files, need_jobs
from slurm.watch.status import facts_of

LINES_BEFORE = 20
POLL_S = 0.5
ASK_S = 10.0


def show_logs(output: Path, *, follow: bool) -> None:
    """Prints logs; with `follow` goes on until the job is over.

    Raises:
        UserError: nothing was submitted for `output`.
    """
    folder = next((f for f in reversed(need_jobs(output)) if log_files(f)), None)
    if folder is None and not follow:
        print(f"{output}: no log yet; `megatron-ladder status` says what the job waits for")
        return
    if not follow:
        assert folder is not None
        _print_all(folder)
        return
    if folder is None:
        print(f"{output}: no log yet; waiting for the job to start", file=sys.stderr)
    _follow(folder or need_jobs(output)[-1])


def _print_all(folder: Path) -> None:
    files = log_files(folder)
    for file in files:
        if len(files) > 1:
            print(f"==> {file} <==")
        with file.open("rb") as log:
            while block := log.read(1 << 20):
                sys.stdout.buffer.write(block)
        sys.stdout.flush()


def _follow(folder: Path) -> None:
    """Prints what is new in a job's logs, until the job is over and all is printed."""
    ends: dict[Path, int] = {}
    asked = time.monotonic()
    is_over = False
    while True:
        is_last_look = is_over
        for file in log_files(folder):
            if file not in ends:
                ends[file] = _tail_start(file)
            with file.open("rb") as log:
                log.seek(ends[file])
                block = log.read()
            ends[file] += len(block)
            sys.stdout.buffer.write(block)
        sys.stdout.flush()
        if is_last_look:
            return
        if time.monotonic() - asked > ASK_S or not ends:
            facts = facts_of([folder])[folder]
            is_over = facts is not None and not any(fact.is_active for fact in facts)
            asked = time.monotonic()
        time.sleep(POLL_S)


def _tail_start(file: Path) -> int:
    """The offset of the last LINES_BEFORE lines."""
    size = file.stat().st_size
    with file.open("rb") as log:
        begin = max(size - (1 << 16), 0)
        log.seek(begin, os.SEEK_SET)
        lines = log.read().splitlines(keepends=True)
    return size - sum(map(len, lines[-LINES_BEFORE:]))
