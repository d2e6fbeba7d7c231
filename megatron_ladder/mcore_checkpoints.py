"""Saves and loads megatron-core's distributed checkpoints, whose interface changes between versions.

Works with megatron-core 0.16.1 (Python 3.11) and 0.19.2 (Python 3.12 and later).
"""

import functools
import inspect
import logging
import multiprocessing
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
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


class SharedSaving:
    """How data-parallel ranks share the writing of what they have alike. One object for all saves of a run.

    The ranks agree at the first save, where they also check that together they write everything, once.
    """

    def __init__(self) -> None:
        self.errors = _KeepingErrors("torch_dist", 1)
        group = parallel_state.get_data_parallel_group(True)
        self.strategy = FullyParallelSaveStrategyWrapper(
            self.errors, group, do_cache_distribution=True
        )


class BackgroundSave:
    """Saves a checkpoint in the background. All ranks make it, and call its methods, in the same order.

    The tensors are copied, or the writing process is forked, when this returns. It is megatron-core's own
    asynchronous saving, except that rank 0 keeps an error of its last write. There megatron-core hangs.

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
        self._strategy = shared.errors
        self._strategy.error = None
        self._error = ""
        options: dict[str, Any] = {}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:  # 0.19
            options["async_strategy"] = "mcore"
            # It logs that nvidia-resiliency-ext will replace this strategy. A user need not act on that.
            logging.getLogger(TorchDistSaveShardedStrategy.__module__).setLevel(logging.ERROR)
        request = dist_checkpointing.save(
            state,
            str(folder),
            sharded_strategy=shared.strategy,
            validate_access_integrity=False,  # `shared` has checked it
            async_sharded_save=True,
            content_metadata=content_metadata,
            **options,
        )
        request.finalize_fns.pop()  # it writes metadata.json; here `result` does that
        self._receiver, sender = multiprocessing.Pipe(duplex=False)
        self._writes = request.async_fn is not None
        if self._writes:
            write = functools.partial(_write, request.async_fn, then, sender)
            request = request._replace(async_fn=write)
        self._queue = AsyncCallsQueue()
        self._queue.schedule_async_request(request)

    def is_written(self, *, wait: bool) -> bool:
        """Whether all ranks' writing processes have ended, with or without error. `wait`: wait for them."""
        try:
            return bool(self._queue.maybe_finalize_async_calls(blocking=wait))
        except CheckpointException as failure:  # all ranks raise it; only rank 0 has the reasons
            reasons = [str(error) for error, _ in failure.failures.values()]
            self._error = "; ".join(reasons) or "another rank could not write"
            return True

    def result(self) -> tuple[str, dict[str, Any]]:
        """This rank's error ("" for none), and the result of `then`. Call it once, after `is_written`."""
        try:
            if not self._error and self._strategy.error:
                raise self._strategy.error
            if not self._error and torch.distributed.get_rank() == 0:
                save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))
        except OSError as error:
            self._error = str(error)
        if self._error or not self._writes:
            return self._error, {}
        if not self._receiver.poll():
            return "a process that writes checkpoints has ended early", {}
        return "", self._receiver.recv()


def _write(
    write: Callable, then: Callable, sender: Any, rank: int, buckets: list[Any], queue: Any
) -> None:
    write(rank, buckets, queue)
    sender.send(then([Path(path) for path, *_ in buckets]))


class _KeepingErrors(TorchDistSaveShardedStrategy):
    """Keeps an OSError of rank 0's last write, the tensors' index, because the other ranks wait for it."""

    error: OSError | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, *args: Any) -> Any:
        finish = writer.finish

        def finish_or_keep(*results: Any) -> None:
            try:
                finish(*results)
            except OSError as error:
                self.error = error

        writer.finish = finish_or_keep
        return super()._get_save_and_finalize_callbacks(writer, *args)
