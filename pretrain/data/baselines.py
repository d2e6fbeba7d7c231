"""The loss of a model without context on each data set: counted in a process, while training goes on.

A validation split may have billions of tokens. What was counted is kept in the run's folder, so that a
start counts only what no start before has counted.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_ladder.errors import UserError
from megatron_ladder.json_files import read_json
from pretrain.config.train import TrainConfig
from pretrain.data.folders import DataFolder, labels, unigram_loss
from pretrain.files import write_atomically
from pretrain.ranks import is_first_rank

logger = logging.getLogger(__name__)


class Baselines:
    """The entropy of single tokens of each validation split. Only the first rank has them."""

    def __init__(self, config: TrainConfig, folders: list[DataFolder]) -> None:
        """Called by every rank before torch.distributed and CUDA start, since the first rank forks here."""
        assert config.output_dir is not None
        self._receiver: Connection | None = None
        if not is_first_rank():
            return
        self._receiver, sender = multiprocessing.Pipe(duplex=False)
        multiprocessing.get_context("fork").Process(
            target=_count,
            args=(config.output_dir / "data" / "unigram_losses.json", folders, sender),
            daemon=True,  # when the run ends early, it ends too
        ).start()
        sender.close()  # the process has its own

    def arrived(self, *, wait: bool = False) -> list[tuple[str, float]]:
        """The labels of data sets that have been counted since the last call, with nats a token.

        Args:
            wait: wait for all that are left.
        """
        arrived = []
        while self._receiver is not None and (wait or self._receiver.poll()):
            try:
                arrived.append(self._receiver.recv())
            except EOFError:  # that was the last
                self._receiver = None
        return arrived


def _count(file: Path, folders: list[DataFolder], sender: Connection) -> None:
    # The run does not wait for this process, so it ends at a stop signal.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.nice(10)
    known = _known(file)
    try:
        for label, folder in zip(labels(folders), folders, strict=True):
            if not folder.tokens("validation"):
                continue
            split = json.dumps(folder.manifest["splits"]["validation"], sort_keys=True)
            key = hashlib.sha256(split.encode()).hexdigest()
            if key not in known:
                known[key] = unigram_loss(folder)
                file.parent.mkdir(exist_ok=True)
                write_atomically(file, json.dumps(known, indent=1) + "\n")
            sender.send((label, known[key]))
    except OSError as error:
        logger.warning("the tokens of a validation split could not be counted: %s", error)


def _known(file: Path) -> dict[str, float]:
    try:
        return {key: float(loss) for key, loss in read_json(file, "a cache").items()}
    except (OSError, UserError, ValueError, TypeError, OverflowError):
        return {}
