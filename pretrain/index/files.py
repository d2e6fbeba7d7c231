"""Makes the parts of a run's index files (parts.py), several at a time, and says how far they are.

A part is made in a temporary folder. Its files are synced and moved to their place, the one that stands for
the part last. So a part is there whole or not at all, and whoever is ended goes on with the parts that are
left. Several machines may make parts of one run: two that make the same part make the same bytes.
"""

import contextlib
import math
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron_ladder.free_memory import memory_here
from pretrain.config.train import TrainConfig
from pretrain.data.blends import stretches
from pretrain.data.folders import DataFolder
from pretrain.files import sync
from pretrain.index.parts import OrderPart, Part, PhasesPart, index_parts
from pretrain.sizes import in_units

POLL_S = 1.0
_SMALL = 1 << 30  # tokens
_LAST = ("-description.txt", "-phases.npy")  # each stands for the files that are made with it


@dataclass(frozen=True)
class Progress:
    """How far the making of index files is."""

    words: str
    work: float
    """Grows as long as the processes do something, and stands still when all of them hang."""


class Maker:
    """Makes index files of a run in its own processes.

    Args:
        path: the folder of the index files.
        rank, world_size: of a job array's task, to name its temporary folders.
    """

    def __init__(
        self,
        config: TrainConfig,
        folders: list[DataFolder],
        path: Path,
        *,
        rank: int | None = None,
        world_size: int = 1,
    ) -> None:
        self._config, self._folders, self._path = config, folders, path
        self._rank, self._world_size = rank, world_size

    def make(self) -> Iterator[Progress]:
        """Makes what is missing; of a job array's task, its share. Gives its progress about once a second.

        Raises:
            OSError: a part could not be made.
        """
        parts = index_parts(self._config, self._folders, self._path)
        # The largest first, so that no process has a large one left when the others have finished; in the
        # same order for all tasks of an array.
        parts.sort(key=lambda part: (not isinstance(part, OrderPart), -part.tokens))
        mine = parts if self._rank is None else parts[self._rank :: self._world_size]
        with self._temporary() as folder:
            yield from self._work(mine, folder)
            stretched = stretches(self._config, self._folders)
            if len(stretched) > 1 and self._rank is None:
                yield from self._work([PhasesPart(stretched[-1].end)], folder)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        place, name = self._path.parent, f".{self._path.name}"
        task = "" if self._rank is None else f"task_{self._rank}_of_{self._world_size}."
        for left in place.glob(f"{name}.{task}*"):  # by a process that was killed
            if task or not left.name.startswith(f"{name}.task_"):
                shutil.rmtree(left, ignore_errors=True)
        self._path.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{name}.{task}", dir=place))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _work(self, parts: list[Part], folder: Path) -> Iterator[Progress]:
        left = [part for part in parts if not is_whole(part)]
        report = _Report(parts, left)
        running: dict[Any, tuple[list[Part], Any]] = {}
        room, cores = memory_here() // 2, len(os.sched_getaffinity(0))
        # A process makes several small parts, but each has some turns: one may be slower than it seems.
        together = min(_SMALL, sum(part.tokens for part in left) // (8 * cores))
        fork = multiprocessing.get_context("fork")  # all modules are imported already
        reasons = fork.SimpleQueue()
        try:
            while left or running:
                while left and len(running) < cores:
                    used = sum(max(p.memory for p in some) for some, _ in running.values())
                    some = _next(left, room - used, together, must=not running)
                    if not some:
                        break
                    process = fork.Process(target=self._make_some, args=(some, folder, reasons))
                    process.start()
                    running[process.sentinel] = (some, process)
                for ended in connection.wait(list(running), POLL_S):
                    some, process = running.pop(ended)
                    process.join()
                    if process.exitcode:
                        raise OSError(None, *_reason(process, reasons, some))
                    report.done(some)
                yield report.now([process for _, process in running.values()])
        finally:
            for _, process in running.values():
                process.kill()
                process.join()

    def _make_some(self, parts: list[Part], folder: Path, reasons: Any) -> None:
        for part in parts:
            try:
                self._make_part(part, folder)
            except OSError as error:
                where = f" ({error.filename})" if error.filename else ""
                reasons.put((f"{error.strerror or error}{where}", part.what))
                raise SystemExit(1) from None

    def _make_part(self, part: Part, folder: Path) -> None:
        target = Path(tempfile.mkdtemp(dir=folder))
        if isinstance(part, PhasesPart):  # megatron-core finds the other parts' files here
            for file in self._path.iterdir():
                (target / file.name).symlink_to(file.absolute())
        part.make(self._config, self._folders, target)
        made = [file for file in target.iterdir() if not file.is_symlink()]
        assert not part.files or {f.name for f in made} == {f.name for f in part.files}
        made.sort(key=lambda file: file.name.endswith(_LAST))
        for file in made:
            sync(file)
        for file in made:
            file.replace(self._path / file.name)
        sync(self._path)
        shutil.rmtree(target)


def _next(left: list[Part], room: int, together: int, *, must: bool) -> list[Part]:
    """Takes from `left` what a process makes next: the first part that has room in memory, and small ones
    that follow it. [] when none has room, unless there `must` be one."""
    some: list[Part] = []
    tokens = 0
    for part in list(left):
        if part.memory > room and not (must and not some):
            continue
        tokens += part.tokens
        if some and tokens > together:
            break
        left.remove(part)
        some.append(part)
        if isinstance(part, OrderPart):
            part.begin()
            break
    return some


def is_whole(part: Part) -> bool:
    """Whether the part's files are in their place."""
    arrays = [file for file in part.files if file.suffix == ".npy"]
    return (
        bool(part.files)
        and all(file.is_file() for file in part.files)
        and all(map(is_array, arrays))
    )


def is_array(file: Path) -> bool:
    """Whether a file is an array of numbers, and has all of them. Else megatron-core 0.16 unpickles it, or
    cannot map it."""
    if not file.is_file():  # opening a pipe could take for ever
        return False
    with file.open("rb") as opened:
        try:
            if np.lib.format.read_magic(opened) != (1, 0):  # others have long headers
                return False
            shape, _, dtype = np.lib.format.read_array_header_1_0(opened)
        except (ValueError, TypeError):
            return False
        size = opened.tell() + math.prod(shape) * dtype.itemsize
        return (
            not dtype.hasobject
            and min(shape, default=0) >= 0
            and size <= os.fstat(opened.fileno()).st_size
        )


def _reason(process: Any, reasons: Any, parts: list[Part]) -> tuple[str, str]:
    """Why a process has failed, and at what."""
    reason, what = "the process failed: see the error above", parts[0].what
    if not reasons.empty():
        reason, what = reasons.get()
    elif process.exitcode < 0:
        reason = f"the process was ended by signal {-process.exitcode}: was memory full?"
    return reason, f"index files of {what}"


class _Report:
    def __init__(self, parts: list[Part], left: list[Part]) -> None:
        self._parts, self._before = len(parts), len(parts) - len(left)
        self._order = next((p for p in left if isinstance(p, OrderPart)), None)
        self._tokens = sum(part.tokens for part in parts)
        self._before_tokens = self._done_tokens = self._tokens - sum(p.tokens for p in left)
        self._done, self._names = self._before, [part.what for part in left]
        self._cpu: dict[int, float] = {}
        self._began = time.monotonic()
        self._order_ended = False

    def done(self, parts: list[Part]) -> None:
        self._done += len(parts)
        self._done_tokens += sum(part.tokens for part in parts)
        self._order_ended |= self._order in parts

    def now(self, processes: list[Any]) -> Progress:
        for process in processes:
            with contextlib.suppress(psutil.Error):  # it has just ended
                self._cpu[process.pid] = sum(psutil.Process(process.pid).cpu_times()[:2])
        seconds = max(time.monotonic() - self._began, 1e-9)
        words = f"index files: {self._done:,} of {self._parts:,} parts"
        left_s = [0.0]
        if self._tokens:
            rate = (self._done_tokens - self._before_tokens) / seconds
            words += f", {in_units(self._done_tokens)} of {in_units(self._tokens)} tokens"
            words += f" ({in_units(rate)}/s)" if rate else ""
            left = self._tokens - self._done_tokens
            left_s.append(left / rate if rate else 0.0 if not left else float("inf"))
        if self._order:
            share = 1.0 if self._order_ended else self._order.share_done()
            words += f", {share:.0%} of the order of {in_units(self._order.size)} sequences"
            left_s.append((1 - share) / share * seconds if share else float("inf"))
        if 0 < max(left_s) < float("inf"):
            words += f", about {_duration(max(left_s))} left"
        return Progress(words, self._done + sum(self._cpu.values()))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
