"""The order of sequences in a run whose blend changes, or which became longer: each data set goes on where
it was left."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from torch.utils.data import ConcatDataset, Dataset

from pretrain.config.past import Past
from pretrain.config.train import TrainConfig
from pretrain.data.blends import Stretch, interleave

PLACE = np.dtype([("data_set", "<i2"), ("sequence", "<i8")])
"""One sequence of the run: the data set's number, and the sequence's number in that data set."""


class PhasedSequences(Dataset):
    """The sequences of a run with several stretches (blends.py), in the order of training.

    Those of the first stretch are what megatron-core drew when the run began. After that, each data set
    continues through the sequences that megatron-core drew of it then, then through whole epochs, each with
    its own shuffle. So no sequence depends on how many will be read.
    """

    def __init__(
        self,
        start: Any,
        parts: list[Stretch],
        config: TrainConfig,
        cache: Path,
        epoch: Callable[[int, int], Any],
        *,
        made: bool = False,
    ) -> None:
        """
        Args:
            start: what megatron-core drew when the run began, by the first blend.
            parts: the run's stretches, in their order.
            config: the run's configuration.
            cache: the folder of index files; the order is saved there too.
            epoch: called with a data set's number and a seed; returns that data set's sequences, each once.
            made: the order is saved already.
        """
        used = [i for i, share in enumerate(parts[0].shares) if share]
        blended = isinstance(start, BlendedDataset)
        drawn = dict(zip(used, start.datasets if blended else [start], strict=True))
        batch, ramp = config.global_batch_size, config.schedule.rampup_batch_size
        if config.past == Past() and not ramp:
            # In steps, as it has always been: old runs find their files.
            facts = [
                start.unique_description_hash,
                used,
                [part.end // batch for part in parts],
                batch,
            ]
        else:
            facts = [start.unique_description_hash, used, [part.end for part in parts]]
        facts.append([part.shares for part in parts])
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        path, path_to_taken = cache / f"{name}-phases.npy", cache / f"{name}-taken.npy"
        if not made and not path.is_file():
            places, taken = _places(start, used, parts)
            np.save(path_to_taken, taken)
            np.save(path, places)
        self._places = np.load(path, mmap_mode="r")
        self.data_sets: dict[int, ConcatDataset] = {}
        for i, count in enumerate(np.load(path_to_taken)):
            some = [drawn[i]] if i in drawn else []
            while sum(map(len, some)) < count:
                some.append(epoch(i, config.seed + 1 + len(some)))
            if some:
                self.data_sets[i] = ConcatDataset(some)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        place = self._places[idx]
        return self.data_sets[int(place["data_set"])][int(place["sequence"])]


def _places(start: Any, used: list[int], parts: list[Stretch]) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the run's sequences.

    Returns:
        [sequences of the run] of PLACE, and int64 [data sets]: how many sequences each data set gives.
    """
    places = np.empty(parts[-1].end, PLACE)
    begin = parts[0].end
    if isinstance(start, BlendedDataset):
        places["data_set"][:begin] = np.array(used)[start.dataset_index[:begin]]
        places["sequence"][:begin] = start.dataset_sample_index[:begin]
    else:
        places["data_set"][:begin] = used[0]
        places["sequence"][:begin] = np.arange(begin)
    count = len(parts[0].shares)
    taken = np.bincount(places["data_set"][:begin], minlength=count)
    for stretch in parts[1:]:
        part = places[stretch.first : stretch.end]
        part["data_set"] = interleave(stretch.shares, len(part))
        for i in range(count):
            here = np.flatnonzero(part["data_set"] == i)
            part["sequence"][here] = taken[i] + np.arange(len(here))
            taken[i] += len(here)
    return places, taken
