"""A pool of processes, one for each core. Each works through one part after another by itself."""

import contextlib
import errno
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.parts.plan import Part
from data_prep.progress import Progress
from data_prep.read.reading import BadLines, NoTextField, TooManyBadLines

REMOTE_ATTEMPTS = 4
# Errors of the disk that is written to. They end the work, as no input file is their cause.
NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Tally:
    """Bytes read and tokens made so far; all processes add to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.bytes: Synchronized[int] = context.Value("q", 0)
        self.tokens: Synchronized[int] = context.Value("q", 0)

    def add(self, count: int, tokens: int) -> None:
        for value, more in ((self.bytes, count), (self.tokens, tokens)):
            with value.get_lock():
                value.value += more

    def so_far(self) -> tuple[int, int]:
        """Bytes and tokens. It takes no lock: a process that was killed may hold one for ever."""
        return self.bytes.get_obj().value, self.tokens.get_obj().value


class _ShownTally(Tally):
    """The same for work in this very process, which nobody else watches."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def add(self, count: int, tokens: int) -> None:
        super().add(count, tokens)
        self._progress.reached(*self.so_far())


Work = Callable[[Part], dict[str, Any]]
"""Works through a part, and returns facts about it. Among them is "bad": `count` and `examples` of
BadLines."""
Start = Callable[[Tally], Work]
"""Called once in each process. It is sent there, so it must be picklable."""

_in_process: Work


def _start_process(start: Start, tally: Tally) -> None:
    global _in_process
    # One thread in each process, as there is a process for every core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent is not None:
        # Ctrl-C reaches all processes. The parent ends the others.
        signal.signal(signal.SIGINT, signal.SIG_IGN)

        # A killed parent cannot end its processes: they would wait for work for ever.
        def leave() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=leave, daemon=True).start()
    _in_process = start(tally)


def _one_part(part: Part) -> dict[str, Any]:
    attempt = 1
    while True:
        try:
            return _in_process(part)
        except UserError:
            raise
        except Exception as error:  # remote file systems raise errors of their own
            remote = [s.source.path for s in part.segments if s.source.remote]
            if not remote or getattr(error, "errno", None) in NO_WRITING:
                raise
            if attempt == REMOTE_ATTEMPTS:
                raise UserError(
                    f"{', '.join(remote[:3])} cannot be read, tried {attempt} times: "
                    f"{error or type(error).__name__}"
                ) from error
            time.sleep(2**attempt / 4)
            attempt += 1


@dataclass
class Failed:
    """A part that could not be done."""

    part: Part
    why: str


def about(failed: list[Failed], done: int) -> str:
    """The message about parts that failed."""
    shown = "\n".join(f"  {one.why}" for one in failed[:10])
    more = f"\n  and {len(failed) - 10} more" if len(failed) > 10 else ""
    return f"{len(failed)} parts of the input could not be used, {done} could and are kept:\n{shown}{more}"


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def work_through(
    start: Start, parts: list[Part], workers: int, bad: BadLines, progress: Progress
) -> tuple[list[dict[str, Any]], list[Failed]]:
    """Works through the parts with `workers` processes.

    Args:
        bad: counts the bad lines; it begins with those of the parts that were done before.

    Returns:
        The facts of the parts that were done, in the order of the parts; and the parts that failed.

    Raises:
        UserError: the work cannot go on: too many bad lines, a wrong text field, a killed process.
        OSError: no space.
    """
    done: dict[int, dict[str, Any]] = {}
    failed: list[Failed] = []
    tally = _ShownTally(progress) if len(parts) == 1 else Tally()
    outcomes = _outcomes(start, parts, workers, tally, progress)
    with contextlib.closing(outcomes):  # ends the processes at an error
        _gather(outcomes, done, failed, bad)
    return [done[number] for number in sorted(done)], failed


def _gather(
    outcomes: Iterator[tuple[Part, Any]],
    done: dict[int, dict[str, Any]],
    failed: list[Failed],
    bad: BadLines,
) -> None:
    for part, outcome in outcomes:
        if isinstance(outcome, TooManyBadLines | NoTextField | KeyboardInterrupt) or (
            isinstance(outcome, OSError) and outcome.errno in NO_WRITING
        ):
            raise outcome
        if isinstance(outcome, OSError):
            failed.append(Failed(part, f"{outcome.filename}: {outcome.strerror or outcome}"))
        elif isinstance(outcome, UserError):
            failed.append(Failed(part, str(outcome)))
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            done[part.number] = outcome
            bad.add_part(outcome["bad"])


def _outcomes(
    start: Start, parts: list[Part], workers: int, tally: Tally, progress: Progress
) -> Generator[tuple[Part, Any], None, None]:
    if len(parts) == 1:  # starting a process takes longer
        _start_process(start, tally)
        try:
            outcome: Any = _one_part(parts[0])
        except (UserError, OSError) as error:
            outcome = error
        yield parts[0], outcome
        return
    # Makes glibc give back the memory of long documents. Other systems do not read this variable.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 << 20))
    # numpy's threads for linear algebra take 0.1 s to start, and there is no linear algebra here.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        min(workers, len(parts)), context, initializer=_start_process, initargs=(start, tally)
    )
    try:
        # In the order of the input: an error at its beginning is seen early. Largest first would balance
        # better.
        waiting: dict[Future, Part] = {pool.submit(_one_part, part): part for part in parts}
        while waiting:
            finished, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            progress.reached(*tally.so_far())
            for future in finished:
                part, problem = waiting.pop(future), future.exception()
                if isinstance(problem, BrokenProcessPool):
                    raise UserError(
                        "a process was killed from outside (out of memory?): what is done is kept; "
                        "run the same command again, perhaps with fewer --workers"
                    )
                yield part, problem or future.result()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()  # the next run does its part again
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def peak_memory() -> int:
    """The most bytes of memory this process has held."""
    try:  # getrusage counts memory of the parent process too
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):  # not on Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
