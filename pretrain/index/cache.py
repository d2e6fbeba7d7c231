"""The index files of a run, in RUN/dataset_cache: they say which documents each sequence holds.

A process that the first rank starts makes those that are missing, while the ranks build the model and read
the checkpoint; `megatron-ladder index` makes them before. Then all ranks map the files into memory.
"""

import atexit
import contextlib
import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ladder.errors import UserError
from megatron_ladder.json_files import read_json
from pretrain.config.past import Past
from pretrain.config.train import TrainConfig
from pretrain.config.values import to_dict
from pretrain.data.folders import DataFolder
from pretrain.data.manifests import MOST_BYTES
from pretrain.data.sequences import MADE
from pretrain.files import write_atomically
from pretrain.index.files import Maker, Progress, is_array
from pretrain.ranks import is_first_rank

_LOOK_S = 2.0
_POLL_S = 1.0
_MOST_BYTES, _FAILED = 4096, "failed: "
_SAID = "index_files"  # in the store of the ranks: what rank 0 said last; empty: they are there


class IndexCache:
    """Makes the index files in the background; `wait` ends when they are complete."""

    def __init__(self, config: TrainConfig, folders: list[DataFolder]) -> None:
        """Called by every rank before torch.distributed starts; the first rank holds the run's lock."""
        assert config.output_dir is not None
        self.path = config.output_dir / "dataset_cache"
        self._process: Any = None
        if is_first_rank() and not is_made(self.path, config, folders):
            # A forked process has all modules imported already. Forking is safe here, because CUDA and NCCL
            # have not started.
            fork = multiprocessing.get_context("fork")
            # Memory that both see, and no pipe: the maker must not wait for a reader that builds a model.
            self._said = fork.RawArray("c", _MOST_BYTES)
            self._process = fork.Process(
                target=_make, args=(config, folders, self.path, self._said)
            )
            self._process.start()
            # It has processes of its own, so it cannot be multiprocessing's `daemon`: when the run is
            # refused, it ends without waiting for this process.
            atexit.register(self._process.kill)

    def wait(self) -> Iterator[Progress]:
        """Gives the progress whenever there is some, until all files are made; called by all ranks.

        The others do not wait in a collective, whose time may be over before: rank 0 says how far it is, in
        the store where the ranks have met.

        Raises:
            OSError: they could not be made.
        """
        store = dist.distributed_c10d._get_default_store() if dist.get_world_size() > 1 else None
        if dist.get_rank() > 0:
            yield from _said_by_rank_0(store)
            return
        for progress in self._said_by_maker():
            if store:
                store.set(_SAID, json.dumps([progress.words, progress.work]))
            yield progress
        if store:
            store.set(_SAID, "")

    def _said_by_maker(self) -> Iterator[Progress]:
        before = ""
        while self._process is not None:
            self._process.join(_POLL_S)
            now = self._said.value.decode()
            if self._process.exitcode:
                reason = now if now.startswith(_FAILED) else f"{_FAILED}the process was ended"
                raise OSError(
                    None, reason.removeprefix(_FAILED), "making the data sets' index files"
                )
            if self._process.exitcode == 0:
                return
            if now != before:
                before = now
                # Half of a new text: the next look finds it whole.
                with contextlib.suppress(ValueError):
                    yield Progress(*json.loads(now))


def _said_by_rank_0(store: Any) -> Iterator[Progress]:
    before, pause_s = None, 0.05
    # Looked up again and again: torch prints a warning for each wait in a store that gets no answer.
    while (now := _look(store)) != b"":
        if now is not None and now != before:
            before = now
            yield Progress(*json.loads(now))
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LOOK_S)  # thousands of ranks ask one store


def _look(store: Any) -> bytes | None:
    try:
        return store.get(_SAID) if store.check([_SAID]) else None
    except dist.DistNetworkError:  # the first rank, which holds the store, has ended
        raise SystemExit(1) from None


def make_index(
    config: TrainConfig,
    folders: list[DataFolder],
    path: Path,
    rank: int | None = None,
    world_size: int = 1,
) -> Iterator[Progress]:
    """Makes all index files that are missing, or a job array's task's share of them.

    Gives the progress whenever there is some.

    Raises:
        OSError: they could not be made.
    """
    work = -1.0
    for progress in Maker(config, folders, path, rank=rank, world_size=world_size).make():
        if progress.work > work:
            work = progress.work
            yield progress
    if rank is None:
        write_atomically(path / MADE, json.dumps(_facts(config, folders)) + "\n")


def _make(config: TrainConfig, folders: list[DataFolder], path: Path, said: Any) -> None:
    # This process shares the run's lock. It must end with the run, or a killed run would stay locked.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for progress in make_index(config, folders, path):
            said.value = json.dumps([progress.words, progress.work]).encode()
    except OSError as error:
        said.value = f"{_FAILED}{error.filename}: {error.strerror or error}".encode()[
            : _MOST_BYTES - 1
        ]
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def is_made(path: Path, config: TrainConfig, folders: list[DataFolder]) -> bool:
    """Whether all index files of the run are there."""
    try:
        made = read_json(path / MADE, "a note", MOST_BYTES) == _facts(config, folders)
        return made and all(is_array(file) for file in path.glob("*.npy"))
    except (OSError, UserError):
        return False


def _facts(config: TrainConfig, folders: list[DataFolder]) -> dict[str, Any]:
    """Everything that the index files depend on."""
    manifests = json.dumps([folder.manifest for folder in folders], sort_keys=True)
    phases = [[phase.from_tokens, *phase.weights] for phase in config.data.phases]
    past, batch = config.past, config.global_batch_size
    ramp = config.schedule.rampup_batch_size
    return {
        "folders": [str(folder.path) for folder in folders],
        "manifests": hashlib.sha256(manifests.encode()).hexdigest(),
        "weights": list(config.data.weights or ()),
        "seq_length": config.data.seq_length,
        "sequences": config.samples_after(config.train_steps),
        "seed": config.seed,
        # No fields where there is nothing: made.json of a run from before there were any has none either.
        **({"phases": phases} if phases else {}),
        **({"past": to_dict(past), "batch": batch} if past != Past() or ramp else {}),
        **({"ramp": list(ramp)} if ramp else {}),
    }
