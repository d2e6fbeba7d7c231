"""Makes megatron-core's index files in RUN/dataset_cache: they say which documents each sequence holds.

For 10^8 documents this takes minutes. A process that the first rank starts makes them once for a run, while
the ranks build the model and read the checkpoint. Then all ranks map the files into memory. The files are
written to a temporary folder and moved one by one, so that RUN/dataset_cache never has a half-written file.
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
    """Makes the index files in the background; `ready` waits until they are complete."""

    def __init__(self, config: TrainConfig, folders: list[DataFolder]) -> None:
        """Called by every rank before torch.distributed starts; the first rank holds the run's lock."""
        assert config.output_dir is not None
        self.path = config.output_dir / "dataset_cache"
        self._process: Any = None
        if is_first_rank() and not _is_made(self.path, _facts(config, folders)):
            # A forked process has all modules imported already. Forking is safe here, because CUDA and NCCL
            # have not started.
            self._process = multiprocessing.get_context("fork").Process(
                target=_make,
                args=(config, folders, self.path),
                daemon=True,  # when the run is refused, it ends without waiting for this process
            )
            self._process.start()

    def ready(self) -> Path:
        """Waits until all files are made; called by all ranks.

        Returns:
            The folder of the files.

        Raises:
            RuntimeError: the process that makes them failed.
        """
        if self._process is not None:
            self._process.join()
            if self._process.exitcode:
                raise RuntimeError(
                    "the data sets' index files could not be made: see the error above"
                )
        dist.barrier()
        return self.path


def _make(config: TrainConfig, folders: list[DataFolder], path: Path) -> None:
    # This process shares the run's lock. It must end with the run, or a killed run would stay locked.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # megatron-core's builder needs an initialized process group.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for left in path.parent.glob(f".{path.name}.*"):  # left behind by a run that was killed
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
        made = json.loads((path / "made.json").read_text()) == facts
        return made and all(_is_array(file) for file in path.glob("*.npy"))
    except (OSError, ValueError, RecursionError):
        return False


def _is_array(file: Path) -> bool:
    """Whether a file begins as numpy's arrays do. megatron-core 0.16 unpickles one that does not."""
    with file.open("rb") as opened:
        return opened.read(6) == b"\x93NUMPY"


def _facts(config: TrainConfig, folders: list[DataFolder]) -> dict[str, Any]:
    """Everything that the index files depend on."""
    manifests = json.dumps([folder.manifest for folder in folders], sort_keys=True)
    phases = [[phase.from_tokens, *phase.weights] for phase in config.data.phases]
    return {
        "folders": [str(folder.path) for folder in folders],
        "manifests": hashlib.sha256(manifests.encode()).hexdigest(),
        "weights": list(config.data.weights or ()),
        "seq_length": config.data.seq_length,
        "sequences": config.train_steps * config.global_batch_size,
        "seed": config.seed,
        # Without phases no field: made.json of a run from before there were phases has none either.
        **({"phases": phases} if phases else {}),
    }
