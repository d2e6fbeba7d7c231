"""megatron-core's index files: which documents each sequence holds, in RUN/dataset_cache.

For 10^8 documents they take minutes to draw up. One process of the first rank does it, once a run, while
the ranks build the model and read the checkpoint; then all map the files. They are made in a folder of
their own and moved in one by one, so that none is ever there by half.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.config.train import TrainConfig
from pretrain.data.folders import DataFolder
from pretrain.data.sequences import train_sequences, validation_sequences
from pretrain.files import write_atomically
from pretrain.ranks import is_first_rank


class IndexCache:
    """Makes the files in the background; `ready` waits for them."""

    def __init__(self, config: TrainConfig, folders: list[DataFolder]) -> None:
        """Call before torch.distributed starts, on every rank; the first holds the run's lock."""
        assert config.output_dir is not None
        self.path = config.output_dir / "dataset_cache"
        self._process: Any = None
        if is_first_rank() and not _is_made(self.path, _facts(config, folders)):
            # A fork has everything imported already. Nothing of CUDA or NCCL is there yet to be forked.
            self._process = multiprocessing.get_context("fork").Process(
                target=_make,
                args=(config, folders, self.path),
                daemon=True,  # a run that is refused does not wait for it
            )
            self._process.start()

    def ready(self) -> Path:
        """The folder, when everything is in it; called by all ranks."""
        if self._process is not None:
            self._process.join()
            if self._process.exitcode:
                raise RuntimeError("the data sets' index files could not be made: see above")
        dist.barrier()
        return self.path


def _make(config: TrainConfig, folders: list[DataFolder], path: Path) -> None:
    # The run may be killed; its lock, which this process shares, must not stay held.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # megatron-core's builder asks for ranks.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for left in path.parent.glob(f".{path.name}.*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    train_sequences(config, folders, new)
    validation_sequences(config, folders, new)
    path.mkdir(exist_ok=True)
    for file in sorted(new.iterdir()):
        file.replace(path / file.name)
    new.rmdir()
    write_atomically(path / "made.json", json.dumps(_facts(config, folders)) + "\n")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _is_made(path: Path, facts: dict[str, Any]) -> bool:
    try:
        return json.loads((path / "made.json").read_text()) == facts
    except (OSError, ValueError):
        return False


def _facts(config: TrainConfig, folders: list[DataFolder]) -> dict[str, Any]:
    """All that the files depend on."""
    manifests = json.dumps([folder.manifest for folder in folders], sort_keys=True)
    phases = [[phase.from_tokens, *phase.weights] for phase in config.data.phases]
    return {
        "folders": [str(folder.path) for folder in folders],
        "manifests": hashlib.sha256(manifests.encode()).hexdigest(),
        "weights": list(config.data.weights or ()),
        "seq_length": config.data.seq_length,
        "sequences": config.train_steps * config.global_batch_size,
        "seed": config.seed,
        **({"phases": phases} if phases else {}),  # runs of before have none of them
    }
