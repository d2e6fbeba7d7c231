"""Saves and loads megatron-core's distributed checkpoints, whose interface changes between versions.

Works with megatron-core 0.16.1 (Python 3.11) and 0.19.2 (Python 3.12 and later).
"""

import contextlib
import functools
import inspect
import io
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ladder.reading.in_megatron import read_as_data

read_as_data()  # whatever megatron-core loads


def save_without_tensors(
    state: dict[str, Any], content_metadata: dict[str, Any], folder: str
) -> None:
    """Writes all of a checkpoint but its tensors, which torch's distributed checkpointing (DCP) writes.

    0.19 stores this data among the tensors, but DCP writes their index anew. So common.pt holds the data,
    as in 0.16; 0.19 reads that file too.
    """
    # A copy, because saving adds to the dictionary.
    dist_checkpointing.save(dict(state), folder, content_metadata=content_metadata)
    common = Path(folder) / "common.pt"
    if not common.exists():
        torch.save({**state, "content_metadata": content_metadata}, common)


def load_in_parallel(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Loads a sharded state dict. Of what data-parallel ranks have alike, each reads a part for all.

    Called by all ranks. That every shard is read once is not checked here, for which all ranks would
    exchange lists of all their shards.
    """
    group = parallel_state.get_data_parallel_group(True)
    strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group)
    return dist_checkpointing.load(
        state, str(folder), sharded_strategy=strategy, validate_access_integrity=False
    )


def start_results_queue(initializer: Callable[[], None]) -> None:
    """Starts the process that passes on the results of checkpoint writers, unless it runs already.

    The new process calls `initializer`. megatron-core would start it without one.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer)
        filesystem_async._results_queue = manager.Queue()


START_S = 60.0
"""A writing process that has not begun in so many seconds never will."""
_LOOK_S = 0.1


class SharedSaving:
    """How data-parallel ranks share the writing of what they have alike. One object for all saves of a run.

    The ranks agree at the first save, where they also check that together they write everything, once.
    """

    def __init__(self) -> None:
        self.index = _IndexLater("torch_dist", 1)
        group = parallel_state.get_data_parallel_group(True)
        self.strategy = FullyParallelSaveStrategyWrapper(
            self.index, group, do_cache_distribution=True
        )


class BackgroundSave:
    """Saves a checkpoint in the background. All ranks make it, and call its methods, in the same order.

    The tensors are copied, or the writing process is forked, when this returns. It is megatron-core's own
    asynchronous saving, except for rank 0's small files: `write_index` writes them. megatron-core writes
    them while all ranks wait, and hangs when it cannot.

    Args:
        state: megatron-core's sharded state dict.
        folder: an existing, empty folder.
        content_metadata: stored in the checkpoint, for loading.
        then: called in a rank's writing process with the files it has written; `result` returns its value.
        shared: of this run. Each save must have the same tensors.
    """

    def __init__(
        self,
        state: dict[str, Any],
        folder: Path,
        content_metadata: dict[str, Any],
        then: Callable[[list[Path]], dict[str, Any]],
        shared: SharedSaving,
    ) -> None:
        self._folder = folder
        self._index = shared.index
        self._error = ""
        options: dict[str, Any] = {}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:  # 0.19
            options["async_strategy"] = "mcore"
            # It logs that nvidia-resiliency-ext will replace this strategy. A user need not act on that.
            logging.getLogger(TorchDistSaveShardedStrategy.__module__).setLevel(logging.ERROR)
        with _common_state_kept() as self._common:
            request = dist_checkpointing.save(
                state,
                str(folder),
                sharded_strategy=shared.strategy,
                validate_access_integrity=False,  # `shared` has checked it
                async_sharded_save=True,
                content_metadata=content_metadata,
                **options,
            )
        request.finalize_fns.pop()  # it writes metadata.json; here `write_index` does that
        self._receiver, sender = multiprocessing.Pipe(duplex=False)
        self._writes = request.async_fn is not None
        if self._writes:
            write = functools.partial(_write, request.async_fn, then, sender)
            request = request._replace(async_fn=write)
        self._queue = AsyncCallsQueue()
        self._queue.schedule_async_request(request)
        self._last_begin = time.monotonic() + START_S
        self._has_begun = False

    def is_written(self, *, wait: bool) -> bool:
        """Whether all ranks' writing processes have ended, with or without error. `wait`: wait for them."""
        self._end_what_never_begins(wait=wait)
        try:
            return bool(self._queue.maybe_finalize_async_calls(blocking=wait))
        except CheckpointException as failure:  # all ranks raise it; only rank 0 has the reasons
            reasons = [str(error) for error, _ in failure.failures.values()]
            self._error = self._error or "; ".join(reasons) or "another rank could not write"
            return True

    def result(self) -> tuple[str, dict[str, Any]]:
        """This rank's error ("" for none), and the result of `then`. Call it once, after `is_written`."""
        if self._error or not self._writes:
            return self._error, {}
        self._end_what_never_begins(wait=False)  # takes its first word
        with contextlib.suppress(EOFError):  # of a process that was killed, or failed, in `then`
            if self._receiver.poll():
                return "", self._receiver.recv()
        return "a process that writes checkpoints has ended early", {}

    def _end_what_never_begins(self, *, wait: bool) -> None:
        """Kills a writing process that hangs since it was forked, so that this save alone fails.

        In Python 3.11 a fork can copy a lock of the interpreter that another thread holds at that moment.
        """
        if self._has_begun or not self._writes:
            return
        process = (
            self._queue.async_calls[-1].async_caller.process if self._queue.async_calls else None
        )
        while not self._receiver.poll(_LOOK_S if wait else 0.0):
            if process is None or not process.is_alive():
                return
            if time.monotonic() > self._last_begin:
                self._error = f"a process that writes checkpoints did not begin in {START_S:.0f} s"
                process.kill()
                process.join()
            elif not wait:
                return
        self._has_begun = self._receiver.recv()

    def write_index(self) -> None:
        """Writes the files that rank 0 writes for all, when no rank has an error. Raises OSError."""
        for name, content in self._common.items():
            (self._folder / name).write_bytes(content)
        self._index.write_index()
        save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))


def _write(
    write: Callable, then: Callable, sender: Any, rank: int, buckets: list[Any], queue: Any
) -> None:
    sender.send(True)  # it has begun
    write(rank, buckets, queue)
    sender.send(then([Path(path) for path, *_ in buckets]))


class _IndexLater(TorchDistSaveShardedStrategy):
    """Keeps rank 0's last write, the tensors' index, for later."""

    write_index: Callable[[], None]

    def _get_save_and_finalize_callbacks(self, writer: Any, *args: Any) -> Any:
        finish = writer.finish

        def keep(*results: Any) -> None:
            self.write_index = functools.partial(finish, *results)

        writer.finish = keep
        return super()._get_save_and_finalize_callbacks(writer, *args)


@contextlib.contextmanager
def _common_state_kept() -> Iterator[dict[str, bytes]]:
    """Keeps, by its name, the file that 0.16 writes before the tensors. 0.19 has none."""
    kept: dict[str, bytes] = {}
    strategy = getattr(common, "TorchCommonSaveStrategy", None)
    if strategy is None:
        yield kept
        return

    def keep(_: Any, state: Any, folder: str) -> None:
        content = io.BytesIO()
        torch.save(state, content)
        kept["common.pt"] = content.getvalue()

    before, strategy.save_common = strategy.save_common, keep
    try:
        yield kept
    finally:
        strategy.save_common = before
