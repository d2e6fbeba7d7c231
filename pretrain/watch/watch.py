"""Measures and exports a run's checkpoints while it trains: one process at a time, beside the ranks.

The process is `megatron-ladder eval` or `export`, as a person would type it, with the lowest priority and
without a GPU. A thread of the first rank starts it and waits for it, so training waits for neither. What it
writes is moved to its place when it has ended well: a process that is killed leaves nothing there.

The lines of metrics.jsonl are the record of what is done. A start looks for checkpoints that should have
been measured or exported, and have no line.
"""

import logging
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Literal, Self

from megatron_ladder.json_files import in_words, read_json
from pretrain.config.train import TrainConfig
from pretrain.data.folders import DataFolder
from pretrain.processes import no_stop_signals
from pretrain.ranks import is_first_rank
from pretrain.run.folder import EVALUATIONS, EXPORTS, checkpoint_at, checkpoint_step, checkpoints
from pretrain.run.lines import left_out
from pretrain.watch.commands import beside, environment, eval_arguments, export_arguments

logger = logging.getLogger(__name__)

What = Literal["evaluation", "export"]
DONE: dict[What, str] = {"evaluation": "measured", "export": "exported"}

LOGS = "watch"
"""In a run's folder: what a process prints, and its results until it has ended."""
TRIES = 2
"""A process that was killed is started again so often in all. One that failed by itself is not."""
MOST: dict[What, int] = {"evaluation": 1, "export": 2}
"""So many checkpoints wait for it at most: each stays on the disk meanwhile."""
LOWEST = 19
SAY_EVERY_S = 60.0
_SHOWN_BYTES = 4096


@dataclass(frozen=True)
class News:
    """What has come of a checkpoint: a line of metrics.jsonl."""

    kind: Literal["evaluation", "export", "watch_failed", "watch_left_out"]
    step: int
    text: str
    """For people."""
    facts: dict[str, Any]
    """The line's other fields; docs/reference/formats.md has them."""


@dataclass
class _Work:
    """What is to be done with a checkpoint."""

    step: int
    whats: list[What] = field(default_factory=list)


class _Killed(Exception):
    """The process was ended by a signal."""


class Watch:
    """What is done beside the run. Every rank makes one, and that of the first rank works.

    Within the `with` it works; at the end of it, a process that still runs is ended.

    Args:
        config: the run's configuration.
        folders: its data sets.
        lines: the lines of metrics.jsonl that earlier starts have written, with their kinds.
    """

    def __init__(
        self,
        config: TrainConfig,
        folders: Sequence[DataFolder],
        lines: Sequence[dict[str, Any]],
    ) -> None:
        assert config.output_dir is not None
        self._config, self._folders, self._run_dir = config, folders, config.output_dir
        self._is_on = config.watch.is_on and is_first_rank()
        self._waiting: list[_Work] = []
        self._at_work: _Work | None = None
        self._doing = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._is_alone = self._is_ending = False
        self._said = ("", 0.0)
        self._changed = threading.Condition()
        self._news: SimpleQueue[News] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
        if self._is_on:
            self._waiting = self._owed(lines)

    def __enter__(self) -> Self:
        if self._is_on:
            for left in (self._run_dir / LOGS).glob("*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._changed:
            self._is_ending = True
            if self._process is not None:
                self._process.kill()
            self._changed.notify_all()
        if self._is_on:
            self._thread.join()

    def saved(self, step: int) -> None:
        """Call it on the first rank when a checkpoint is complete, before old ones are deleted.

        An older checkpoint that waits to be measured is left out: the newest one tells more. Two wait to be
        exported, so that exports that are slower than saves do not fill the disk.
        """
        if not (self._is_on and (whats := self._whats(step))):
            return
        with self._changed:
            self._waiting.append(_Work(step, whats))
            for what in whats:
                self._leave_out(what, step)
            self._changed.notify_all()

    def _leave_out(self, what: What, now: int) -> None:
        """Leaves out all but the newest of the checkpoints that wait for it."""
        for work in [work for work in self._waiting if what in work.whats][: -MOST[what]]:
            work.whats.remove(what)
            why = f"{self._doing or 'another checkpoint'} took until step {now}"
            text = f"not {DONE[what]}: {why}"
            self._tell("watch_left_out", work.step, text, what=what, reason=why)
        self._waiting = [work for work in self._waiting if work.whats]

    def held(self) -> set[int]:
        """The steps whose checkpoints are not to be deleted yet. Any thread may call it."""
        with self._changed:
            works = [*self._waiting, *([self._at_work] if self._at_work else [])]
            return {work.step for work in works}

    def is_busy(self) -> bool:
        """Whether something is being done, or waits for it."""
        with self._changed:
            return bool(self._waiting or self._at_work)

    @property
    def doing(self) -> str:
        """What is being done, in words; "": nothing."""
        return self._doing

    def waited_for(self) -> None:
        """Call it again and again when the training is over and the ranks wait. What begins from now on
        need not step back. Says what is waited for, and again each minute."""
        self._is_alone = True
        what, now = self._doing, time.monotonic()
        if self._is_on and what and (what != self._said[0] or now - self._said[1] >= SAY_EVERY_S):
            self._said = (what, now)
            logger.info(
                "the training is done; waiting for the %s (Ctrl-C: the next start does it)",
                what,
            )

    def news(self) -> list[News]:
        """What has come of checkpoints since the last call."""
        found = []
        try:
            while True:
                found.append(self._news.get_nowait())
        except Empty:
            return found

    def _whats(self, step: int) -> list[What]:
        config, watch = self._config, self._config.watch
        is_last = step == config.train_steps
        whats: list[What] = []
        if watch.tasks and (is_last or watch.measures(step, config.save_interval)):
            whats.append("evaluation")
        if watch.export_interval and (is_last or watch.exports(step)):
            whats.append("export")
        return whats

    def _owed(self, lines: Sequence[dict[str, Any]]) -> list[_Work]:
        """What an earlier start has not come to, of the checkpoints that are left."""
        done = {(line["step"], line["kind"]) for line in lines}
        done |= {
            (line["step"], left_out(line)) for line in lines if line["kind"] == "watch_left_out"
        }
        works = []
        for step in map(checkpoint_step, checkpoints(self._run_dir)):
            whats = [what for what in self._whats(step) if (step, what) not in done]
            if whats and step:
                what = " and ".join(whats)
                logger.info("step %d was saved, without its %s: it is done now", step, what)
                works.append(_Work(step, whats))
        return works

    def _tell(self, kind: Any, step: int, text: str, **facts: Any) -> None:
        self._news.put(News(kind, step, f"step {step}: {text}", facts))

    def _work(self) -> None:
        """The thread: a checkpoint after another, the oldest first."""
        while True:
            with self._changed:
                self._at_work, self._doing = None, ""
                self._changed.wait_for(lambda: self._waiting or self._is_ending)
                if self._is_ending:
                    return
                self._at_work = work = self._waiting.pop(0)
            for what in work.whats:
                self._do(what, work.step)

    def _do(self, what: What, step: int) -> None:
        """Measures or exports a checkpoint. Whatever fails is told, and the training goes on."""
        self._doing = f"{what} of step {step}"
        name = f"step_{step:08d}"
        log = self._run_dir / LOGS / f"{name}.{what}.log"
        began = time.monotonic()
        for attempt in range(1, TRIES + 1):
            reason = ""
            try:
                if what == "evaluation":
                    self._measure(step, name, log, began)
                else:
                    self._export(step, name, log, began)
            except _Killed as killed:
                reason = str(killed)
                if attempt < TRIES and not self._is_ending:
                    continue
            except Exception as error:  # of whatever kind: the training must go on
                reason = str(error)
            break
        if self._is_ending:
            return
        if reason:
            text = f"its {what} failed: {reason}. What it printed: {log}"
            self._tell("watch_failed", step, text, what=what, reason=reason)
        else:
            log.unlink(missing_ok=True)

    def _measure(self, step: int, name: str, log: Path, began: float) -> None:
        folder = self._run_dir / LOGS / f"{name}.tmp"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        checkpoint = checkpoint_at(self._run_dir, step)
        failed = self._run(eval_arguments(self._config, self._folders, checkpoint, folder), log)
        for file in folder.glob("*.json"):  # where a task has failed, the others' results are there
            results = read_json(file, "a file of `megatron-ladder eval`")["results"]
            place = self._run_dir / EVALUATIONS / file.name
            place.parent.mkdir(exist_ok=True)
            file.rename(place)
            fields = ("task", "data", "split", "metrics")
            kept = [{n: one[n] for n in fields if n in one} for one in results]
            facts = {"file": f"{EVALUATIONS}/{file.name}", "results": kept}
            self._tell(
                "evaluation", step, f"measured: {_words(kept)}", **self._cost(step, began), **facts
            )
        shutil.rmtree(folder, ignore_errors=True)
        if failed:
            raise RuntimeError(failed)

    def _export(self, step: int, name: str, log: Path, began: float) -> None:
        folder = self._run_dir / EXPORTS / name
        arguments = export_arguments(checkpoint_at(self._run_dir, step), folder)
        if failed := self._run(arguments, log):
            raise RuntimeError(failed)
        place = f"{EXPORTS}/{name}"
        self._tell("export", step, f"exported to {folder}", **self._cost(step, began), folder=place)

    def _cost(self, step: int, began: float) -> dict[str, Any]:
        seconds = round(time.monotonic() - began, 3)
        return {"tokens": self._config.tokens_after(step), "seconds": seconds}

    def _run(self, arguments: list[str], log: Path) -> str:
        """Runs a command to its end.

        Returns:
            Why it failed; "": it has not.

        Raises:
            _Killed: a signal has ended it.
        """
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as output, self._changed:
            if self._is_ending:
                raise _Killed("the training ends")
            with no_stop_signals():  # they are for the ranks: a rank ends this process
                # Of the last checkpoint, the ranks wait for it: it need not step back.
                is_last = self._at_work and self._at_work.step == self._config.train_steps
                alone = self._is_alone or bool(is_last)
                self._process = subprocess.Popen(  # noqa: S603 (a list, no shell)
                    beside(arguments, nice=0 if alone else LOWEST),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment(alone=alone),
                )
        # The kernel ends the process when this thread ends, which is why the thread waits for it.
        status = self._process.wait()
        with self._changed:
            self._process = None
        if status < 0:
            raise _Killed(f"its process was ended by signal {-status}")
        return _reason(log, status) if status else ""


def scalars(results: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of an evaluation by their names: last_word/data/accuracy. Without standard errors."""
    found = {}
    for result in results:
        for metric, value in result["metrics"].items():
            if "_stderr" not in metric and type(value) in (int, float):
                where = [result["task"], *([result["data"]] if "data" in result else []), metric]
                found["/".join(where)] = float(value)
    return found


def _words(results: list[dict[str, Any]]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scalars(results).items())


def _reason(log: Path, status: int) -> str:
    """What a command that has failed says at its end."""
    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _SHOWN_BYTES))
        text = file.read().decode(errors="replace")
    for name in ("eval", "export"):
        _, found, said = text.rpartition(f"megatron-ladder {name}: ")
        if found:
            return in_words(" ".join(said.split()))
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return in_words(lines[-1]) if lines else f"exit status {status}"
