"""Checkpoints, written in the background while training goes on; visible when all ranks have written."""

import contextlib
import functools
import logging
import os
import shutil
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from megatron_ladder.mcore_checkpoints import BackgroundSave, SharedSaving, start_results_queue
from pretrain.config.train import TrainConfig, save_config
from pretrain.files import sync
from pretrain.loop.log import RunLog
from pretrain.processes import die_with_parent, no_stop_signals
from pretrain.run.checkpoint import Progress, checkpoint_state, newest_valid
from pretrain.run.checkpoint_files import sums, write_manifest
from pretrain.run.folder import checkpoint_at, checkpoint_step, checkpoints
from pretrain.sizes import in_units
from pretrain.watch.watch import Watch

logger = logging.getLogger(__name__)

# After so many failures in a row the run ends: training on without checkpoints would only lose more.
MAX_FAILURES = 3
# The pause before another try of a save that training waits for.
_PAUSE_S = 5.0

Result = tuple[str, dict[str, Any]]
"""A rank's error ("": none), and the facts of the files that it has written."""


class CheckpointSaver:
    """Saves a run's checkpoints, and deletes old ones when a new one is complete.

    Every rank calls every method at the same step. A checkpoint's folder has a name that ends in `.tmp`
    until it is complete. When a save fails (no space, no permission, a broken disk), the failure is
    logged, the folder is removed, and training goes on. After MAX_FAILURES failures in a row the run ends
    with exit status 1.

    What the first rank does for all, its thread does, so that training does not wait for the disk: it
    completes a checkpoint that all ranks have written, and deletes the old ones behind it. As a context
    manager it stops deleting at the end; the next start goes on.
    """

    def __init__(self, config: TrainConfig, log: RunLog, watch: Watch | None = None) -> None:
        self._config = config
        self._log = log
        self._watch = watch
        self._saving: BackgroundSave | None = None
        self._is_completing = False
        self._completed: Future[str] | None = None  # of the first rank
        self._shared = SharedSaving()
        self._step = 0
        self._visible: int | None = None  # the step of the last checkpoint that was completed
        self._failures = 0
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._ending = threading.Event()
        with no_stop_signals():  # the process that this starts must not get stop signals either
            start_results_queue(functools.partial(die_with_parent, os.getpid()))
        if dist.get_rank() == 0:
            # What a killed run has left. It is listed here, before there is a folder of this run.
            self._deleted = self._thread.submit(self._delete, self._superfluous())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ending.set()
        self._thread.shutdown()

    def save(
        self, progress: Progress, model: list[Any], optimizer: Any, scheduler: Any, *, wait: bool
    ) -> None:
        """Begins a checkpoint. When it returns, everything that a resumed run needs has been copied.

        Args:
            wait: return only when the checkpoint is complete; a save that fails is tried again.
        """
        self._log.doing("saving")
        self.complete(wait=True)  # the checkpoint before, if it is still being written
        if self._visible == progress.step:  # saved before a validation, in which a signal came
            return
        while True:
            self._begin(progress, model, optimizer, scheduler, wait)
            if not (wait or not self._config.async_save):
                break
            if self.complete(wait=True) or not wait:
                break
            time.sleep(_PAUSE_S)
        self._log.saving_began()

    def complete(self, *, wait: bool = False) -> bool:
        """Takes the next step towards a visible checkpoint, if all ranks have written theirs.

        Args:
            wait: wait until all ranks have written it, and until it is visible.

        Returns:
            Whether this call has found a checkpoint visible.
        """
        if self._saving is not None and self._saving.is_written(wait=wait):
            self._begin_completing(self._saving)
        if not self._is_completing:
            return False
        error: list[str | None] = [None]  # None: it is not known yet
        if self._completed is not None and (wait or self._completed.done()):
            error = [self._completed.result()]
        dist.broadcast_object_list(error)
        if error[0] is None:
            return False
        self._is_completing = False
        if error[0]:
            self._failed(error[0])
            return False
        self._failures = 0
        self._visible = self._step
        self._log.saved(self._step)
        if dist.get_rank() == 0:
            if self._watch:
                self._watch.saved(self._step)
            self._deleted = self._thread.submit(self._delete_old, self._step)
        return True

    def wait_for_deletion(self) -> None:
        """Waits until the old checkpoints are deleted, those too that were needed beside the training.
        Otherwise the next start deletes them."""
        if dist.get_rank() == 0:
            self._thread.submit(self._delete, self._superfluous()).result()

    def newest(self) -> Path | None:
        """The newest valid checkpoint; None: there is none. It waits for the one that is being written."""
        self._log.allow_more()
        self.complete(wait=True)
        self._log.allow_more()  # all of it is read
        assert self._config.output_dir is not None
        return newest_valid(self._config.output_dir)

    @property
    def _final(self) -> Path:
        assert self._config.output_dir is not None
        return checkpoint_at(self._config.output_dir, self._step)

    @property
    def _temporary(self) -> Path:
        return self._final.with_name(self._final.name + ".tmp")

    def _begin(
        self, progress: Progress, model: list[Any], optimizer: Any, scheduler: Any, wait: bool
    ) -> None:
        self._step = progress.step
        if error := self._on_first_rank(self._make_folder, wait):
            self._failed(error)
            return
        state, metadata = checkpoint_state(progress, model, optimizer, scheduler)
        self._saving = BackgroundSave(state, self._temporary, metadata, sums, self._shared)

    def _make_folder(self, hurry: bool) -> str:
        # A run that saves faster than it deletes would fill the disk. And a folder of this name, which a
        # killed run has left, may be being deleted.
        if not hurry or self._temporary.exists():
            self._deleted.result()
        try:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir(parents=True)
        except OSError as error:
            return self._given_up(str(error))
        return ""

    def _begin_completing(self, saving: BackgroundSave) -> None:
        results: list[Any] = [None] * dist.get_world_size()
        is_first = dist.get_rank() == 0
        dist.gather_object(saving.result(), results if is_first else None)
        self._saving = None
        self._is_completing = True
        if is_first:
            self._completed = self._thread.submit(self._make_visible, saving, results)

    def _make_visible(self, saving: BackgroundSave, results: list[Result]) -> str:
        """Completes what all ranks have written. Runs in the first rank's thread.

        Returns:
            Why it could not, and then nothing is left of the checkpoint; "": it is visible.
        """
        try:
            if error := next((error for error, _ in results if error), ""):
                raise OSError(error)
            # A resumed run must find the lines of all steps up to its checkpoint.
            self._log.wait_for_lines()
            saving.write_index()
            save_config(self._config, self._temporary / "config.json")
            facts = {name: file for _, files in results for name, file in files.items()}
            write_manifest(self._temporary, facts)
            self._temporary.rename(self._final)
            sync(self._final.parent)
        except OSError as error:
            return self._given_up(str(error))
        return ""

    def _given_up(self, error: str) -> str:
        """Removes the folder of a save that failed. Returns its error, with the free space of the disk:
        torch does not always pass on why it could not write."""
        shutil.rmtree(self._temporary, ignore_errors=True)
        folder = self._final.parent
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
            return f"{error} ({in_units(free, 'B')} free)"
        return error

    def _failed(self, error: str) -> None:
        self._failures += 1
        self._log.save_failed(self._step, error)
        if self._failures == MAX_FAILURES:
            message = f"{MAX_FAILURES} checkpoints in a row could not be written: {error}"
            sys.exit(message if dist.get_rank() == 0 else 1)

    def _on_first_rank(self, function: Any, *args: Any) -> str:
        """What `function` returns on rank 0, on every rank."""
        result = [function(*args) if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(result)
        return result[0]

    def _superfluous(self) -> list[Path]:
        """All checkpoints but the newest, and what a run has left half written or half deleted. Those that
        are needed beside the training stay for now."""
        assert self._config.output_dir is not None
        held = self._watch.held() if self._watch else set()
        old = checkpoints(self._config.output_dir)[: -self._config.keep_last]
        old = [path for path in old if checkpoint_step(path) not in held]
        left = (self._config.output_dir / "checkpoints").glob("step_*.tmp")
        return [*old, *(path for path in left if path.stem[5:].isdigit())]

    def _delete_old(self, newest: int) -> None:
        """Deletes what is superfluous when the checkpoint of step `newest` is complete."""
        # A later step's folder is being written: training goes on meanwhile.
        self._delete(
            [path for path in self._superfluous() if checkpoint_step(path.with_suffix("")) < newest]
        )

    def _delete(self, folders: list[Path]) -> None:
        """Deletes checkpoints, file by file: at the end of a run it stops. Failures are said."""
        try:
            for folder in folders:
                doomed = folder.with_suffix(".tmp")
                # Renamed first, since a checkpoint that is half deleted must not look complete.
                folder.rename(doomed)
                for file in doomed.iterdir():
                    if self._ending.is_set():
                        return
                    file.unlink()
                doomed.rmdir()
        except OSError as error:
            logger.warning(
                "could not delete an old checkpoint, the next save tries again: %s", error
            )
