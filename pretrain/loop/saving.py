"""Checkpoints, written in the background while training goes on; visible when all ranks have written."""

import functools
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ladder.mcore_checkpoints import BackgroundSave, SharedSaving, start_results_queue
from pretrain.config.train import TrainConfig, save_config
from pretrain.files import sync
from pretrain.loop.log import RunLog
from pretrain.processes import die_with_parent, no_stop_signals
from pretrain.run.checkpoint import Progress, checkpoint_state, newest_valid
from pretrain.run.checkpoint_files import Facts, sums, write_manifest
from pretrain.run.folder import checkpoint_at, checkpoints
from pretrain.sizes import in_units

logger = logging.getLogger(__name__)

# After so many failures in a row the run ends: training on without checkpoints would only lose more.
MAX_FAILURES = 3
# The pause before another try of a save that training waits for.
_PAUSE_S = 5.0
# Rank 0 writes so much to test the disk: more than the small files that only rank 0 writes.
_PROBE = bytes(1 << 20)


class CheckpointSaver:
    """Saves a run's checkpoints, and deletes old ones when a new one is complete.

    Every rank calls every method at the same step. A checkpoint's folder has a name that ends in `.tmp`
    until it is complete. When a save fails (no space, no permission, a broken disk), the failure is
    logged, the folder is removed, and training goes on. After MAX_FAILURES failures in a row the run ends
    with exit status 1.
    """

    def __init__(self, config: TrainConfig, log: RunLog) -> None:
        self._config = config
        self._log = log
        self._saving: BackgroundSave | None = None
        self._shared = SharedSaving()
        self._step = 0
        self._failures = 0
        with no_stop_signals():  # the process that this starts must not get stop signals either
            start_results_queue(functools.partial(die_with_parent, os.getpid()))

    def save(
        self, progress: Progress, model: list[Any], optimizer: Any, scheduler: Any, *, wait: bool
    ) -> None:
        """Begins a checkpoint. When it returns, everything that a resumed run needs has been copied.

        Args:
            wait: return only when the checkpoint is complete; a save that fails is tried again.
        """
        self._log.doing("saving")
        self.complete(wait=True)  # the checkpoint before, if it is still being written
        while True:
            self._begin(progress, model, optimizer, scheduler)
            if not (wait or not self._config.async_save):
                break
            if self.complete(wait=True) or not wait:
                break
            time.sleep(_PAUSE_S)
        self._log.saving_began()

    def complete(self, *, wait: bool = False) -> bool:
        """Makes the checkpoint that is being written visible, if all ranks have written it.

        Args:
            wait: first wait until all ranks have written it.

        Returns:
            Whether this call has made a checkpoint visible.
        """
        if self._saving is None or not self._saving.is_written(wait=wait):
            return False
        self._log.doing("saving")
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, self._saving.result())
        self._saving = None
        error = next((error for error, _ in results if error), "")
        if not error:
            facts = {name: file for _, files in results for name, file in files.items()}
            error = self._on_first_rank(self._make_visible, facts)
        if error:
            self._failed(error)
            return False
        self._failures = 0
        self._log.saved(self._step)
        return True

    def newest(self) -> Path | None:
        """The newest valid checkpoint; None: there is none. It waits for the one that is being written."""
        self.complete(wait=True)
        assert self._config.output_dir is not None
        return newest_valid(self._config.output_dir)

    @property
    def _final(self) -> Path:
        assert self._config.output_dir is not None
        return checkpoint_at(self._config.output_dir, self._step)

    @property
    def _temporary(self) -> Path:
        return self._final.with_name(self._final.name + ".tmp")

    @property
    def _disk(self) -> Path:
        """A folder that exists on the checkpoints' disk, to ask for its free space."""
        folder = self._final.parent
        return folder if folder.is_dir() else folder.parent

    def _begin(self, progress: Progress, model: list[Any], optimizer: Any, scheduler: Any) -> None:
        self._step = progress.step
        if error := self._on_first_rank(self._make_folder):
            self._failed(error)
            return
        state, metadata = checkpoint_state(progress, model, optimizer, scheduler)
        self._saving = BackgroundSave(state, self._temporary, metadata, sums, self._shared)

    def _make_folder(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        probe = self._temporary / "probe"
        with probe.open("wb") as file:
            file.write(_PROBE)
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()

    def _make_visible(self, facts: Facts) -> None:
        save_config(self._config, self._temporary / "config.json")
        write_manifest(self._temporary, facts)
        self._temporary.rename(self._final)
        sync(self._final.parent)
        _prune(self._final.parents[1], self._config.keep_last)

    def _failed(self, error: str) -> None:
        if dist.get_rank() == 0:
            # The free space is added since torch does not always pass on why it could not write.
            error += f" ({in_units(shutil.disk_usage(self._disk).free, 'B')} free)"
            shutil.rmtree(self._temporary, ignore_errors=True)
        self._failures += 1
        self._log.save_failed(self._step, error)
        if self._failures == MAX_FAILURES:
            message = f"{MAX_FAILURES} checkpoints in a row could not be written: {error}"
            sys.exit(message if dist.get_rank() == 0 else 1)

    def _on_first_rank(self, function: Any, *args: Any) -> str:
        """Runs `function`, which writes files, on rank 0 only.

        Returns:
            The text of the OSError that it raised, on every rank; "" when it raised none.
        """
        error = [""]
        if dist.get_rank() == 0:
            try:
                function(*args)
            except OSError as failure:
                error = [str(failure)]
        dist.broadcast_object_list(error)
        return error[0]


def _prune(run_dir: Path, keep_last: int) -> None:
    """Deletes all but the newest checkpoints, and what a killed run left half written or half deleted."""
    for old in checkpoints(run_dir)[:-keep_last]:
        # Renamed first, since a checkpoint that is half deleted must not look complete.
        old.rename(old.with_name(old.name + ".tmp"))
    for leftover in (run_dir / "checkpoints").glob("*.tmp"):
        shutil.rmtree(leftover)
