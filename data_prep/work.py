"""Tokenizes parts, each into files of its own: tokens never travel between processes.

A part is done when its marker is there, which is written last, under the part's key. So a run that is
killed at any instant loses the parts it was at, and nothing else.
"""

import contextlib
import errno
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, Literal

from data_prep.chat import encode
from data_prep.documents import BadLines, NoTextField, Reading, TooManyBadLines, read_segment
from data_prep.engines import Engine, FastEngine, LazyReference
from data_prep.errors import UserError
from data_prep.files import write_durably
from data_prep.guard import Verdict
from data_prep.part_files import PartFiles
from data_prep.parts import Part
from data_prep.progress import Progress
from data_prep.split import Fractions

BadFiles = Literal["stop", "skip"]
REMOTE_ATTEMPTS = 4
LONG_CHARACTERS = 1 << 20
# Errors of the output's disk, which end the work: not of one input file.
NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Job:
    """What a process needs to know to tokenize any part of the input."""

    folder: str
    """Where parts go."""
    fingerprint: str
    """Of everything but the files that decides what comes out."""
    tokenizer: str
    eod_token: str | None
    eod_id: int
    dtype: str
    engine: Verdict
    reading: Reading
    fractions: Fractions
    max_bad_lines: int
    bad_files: BadFiles

    def marker(self, part: Part) -> Path:
        return Path(self.folder) / f"{part.key(self.fingerprint)}.json"

    def is_done(self, part: Part) -> bool:
        return self.marker(part).is_file()


class Tally:
    """Shared by the processes: how far they are."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.bytes: Synchronized[int] = context.Value("q", 0)
        self.tokens: Synchronized[int] = context.Value("q", 0)

    def add(self, count: int, tokens: int) -> None:
        for value, more in ((self.bytes, count), (self.tokens, tokens)):
            with value.get_lock():
                value.value += more


def tokenize_part(job: Job, engine: Engine, part: Part, tally: Tally) -> dict[str, Any]:
    """Writes the part's files and its marker; returns what the marker says.

    Raises:
        UserError, OSError: the input cannot be used or read, or there is no space.
    """
    started = time.monotonic()
    bad = BadLines(job.max_bad_lines)
    sources: list[dict[str, Any]] = []
    empty = 0
    stem = f"{job.marker(part).with_suffix('')}"
    with PartFiles(stem, job.dtype, job.eod_id, job.fractions) as files:
        for segment in part.segments:
            facts: dict[str, Any] = {
                "path": segment.source.path,
                "documents": 0,
                "skipped_lines": 0,
            }
            before = bad.count
            batches = read_segment(segment, job.reading, bad, lambda n: tally.add(n, 0))
            try:
                for texts in long_ones_alone(batches):
                    if job.reading.chat:
                        documents, tokens = files.add_conversations(texts, *encode(engine, texts))
                    else:
                        documents, tokens = files.add(texts, *engine.encode(texts))
                    empty += len(texts) - documents
                    facts["documents"] += documents
                    tally.add(0, tokens)
            except (TooManyBadLines, NoTextField):
                raise
            except UserError as error:
                if job.bad_files == "stop":
                    raise
                facts["error"] = str(error)
            facts["skipped_lines"] = bad.count - before
            sources.append(facts)
        splits = files.close()
    result = {
        "splits": splits,
        "sources": sources,
        "empty": empty,
        "bad": {"count": bad.count, "examples": bad.examples, "replaced": bad.replaced},
        "seconds": time.monotonic() - started,
        "peak_memory": peak_memory(),
    }
    write_durably(job.marker(part), json.dumps(result) + "\n")
    return result


def long_ones_alone(batches: Iterator[list[str]]) -> Iterator[list[str]]:
    """Batches in which a long document is by itself: its ids need not be copied beside others'."""
    for texts in batches:
        some: list[str] = []
        for text in texts:
            if len(text) > LONG_CHARACTERS:
                if some:
                    yield some
                some = []
                yield [text]
            else:
                some.append(text)
        if some:
            yield some


def make_engine(job: Job) -> Engine:
    reference = LazyReference(Path(job.tokenizer), job.eod_token)
    if not job.engine.fast:
        return reference.engine()
    return FastEngine(job.engine.source, job.engine.routed, reference)


_in_process: tuple[Job, Engine, Tally]


def _start_process(job: Job, tally: Tally) -> None:
    global _in_process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core
    parent = multiprocessing.parent_process()
    if parent is not None:
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # Ctrl-C reaches all; the parent ends the others

        # A parent that was killed does not say so: its processes would wait for ever.
        def leave() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=leave, daemon=True).start()
    _in_process = (job, make_engine(job), tally)


def _one_part(part: Part) -> dict[str, Any]:
    job, engine, tally = _in_process
    attempt = 1
    while True:
        try:
            return tokenize_part(job, engine, part, tally)
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


def work_through(
    job: Job, parts: list[Part], workers: int, progress: Progress
) -> tuple[list[dict[str, Any]], list[Failed]]:
    """Does the parts, with a process for each worker.

    Returns:
        What the markers say, in the order of the parts that were done; and the parts that failed.

    Raises:
        UserError: nothing can go on: too many bad lines, a wrong text field, a process that was killed.
        OSError: no space.
    """
    done: dict[int, dict[str, Any]] = {}
    failed: list[Failed] = []
    bad = BadLines(job.max_bad_lines)
    tally = Tally()
    outcomes = _outcomes(job, parts, workers, tally, progress)
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
            bad.count += outcome["bad"]["count"]
            bad.examples = (bad.examples + outcome["bad"]["examples"])[:5]
            bad.check()


def _outcomes(
    job: Job, parts: list[Part], workers: int, tally: Tally, progress: Progress
) -> Generator[tuple[Part, Any], None, None]:
    if len(parts) == 1:  # starting a process takes longer
        _start_process(job, tally)
        try:
            outcome: Any = _one_part(parts[0])
        except (UserError, OSError) as error:
            outcome = error
        yield parts[0], outcome
        return
    # glibc keeps what long documents took, unless it is told to give it back; no other system reads it.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 << 20))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        min(workers, len(parts)), context, initializer=_start_process, initargs=(job, tally)
    )
    try:
        # The largest first would balance better; in order, an error early in the input is seen early.
        waiting: dict[Future, Part] = {pool.submit(_one_part, part): part for part in parts}
        while waiting:
            finished, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            progress.reached(tally.bytes.value, tally.tokens.value)
            for future in finished:
                part, problem = waiting.pop(future), future.exception()
                if isinstance(problem, BrokenProcessPool):
                    raise UserError(
                        "a process was killed from outside (out of memory?): what is done is kept; "
                        "run the same command again, perhaps with fewer --workers"
                    )
                yield part, problem or future.result()
    except BaseException:
        for process in multiprocessing.active_children():  # what they were at is done again
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def peak_memory() -> int:
    """The most bytes of memory this process has held."""
    try:  # getrusage counts what the process that started this one had held, too
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):  # not on Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def clean_up(folder: Path, keys: set[str]) -> None:
    """Removes parts of earlier plans, and what processes that were killed left half written."""
    for path in folder.iterdir():
        if path.name.split(".")[0] not in keys or ".tmp-" in path.name:
            path.unlink()
