"""The order of sequences in a run whose blend changes: each data set continues where it was left."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from torch.utils.data import ConcatDataset, Dataset

from pretrain.config.train import TrainConfig
from pretrain.data.blends import Blend, ends, interleave

PLACE = np.dtype([("data_set", "<i2"), ("sequence", "<i8")])
"""One sequence of the run: the data set's number, and the sequence's number in that data set."""


class PhasedSequences(Dataset):
    """The sequences of a run with phases, in the order of training.

    Up to the first change of the blend they are the sequences of the same run without phases. After that,
    each data set continues through the sequences that megatron-core drew of it for the run without phases,
    then through whole epochs, each with its own shuffle. So no sequence depends on how many will be read.
    """

    def __init__(
        self,
        start: Any,
        planned: list[Blend],
        config: TrainConfig,
        cache: Path,
        epoch: Callable[[int, int], Any],
        *,
        made: bool = False,
    ) -> None:
        """
        Args:
            start: the sequences of the whole run if it kept the first blend.
            planned: the run's blends, in their order.
            config: the run's configuration.
            cache: the folder of index files; the order is saved there too.
            epoch: called with a data set's number and a seed; returns that data set's sequences, each once.
            made: the order is saved already.
        """
        used = [i for i, share in enumerate(planned[0].shares) if share]
        blended = isinstance(start, BlendedDataset)
        drawn = dict(zip(used, start.datasets if blended else [start], strict=True))
        facts = [start.unique_description_hash, used, ends(planned, config)]
        facts += [config.global_batch_size, [blend.shares for blend in planned]]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        path, path_to_taken = cache / f"{name}-phases.npy", cache / f"{name}-taken.npy"
        if not made and not path.is_file():
            places, taken = _places(start, used, planned, config)
            np.save(path_to_taken, taken)
            np.save(path, places)
        self._places = np.load(path, mmap_mode="r")
        self.data_sets: dict[int, ConcatDataset] = {}
        for i, count in enumerate(np.load(path_to_taken)):
            parts = [drawn[i]] if i in drawn else []
            while sum(map(len, parts)) < count:
                parts.append(epoch(i, config.seed + 1 + len(parts)))
            if parts:
                self.data_sets[i] = ConcatDataset(parts)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        place = self._places[idx]
        return self.data_sets[int(place["data_set"])][int(place["sequence"])]


def _places(
    start: Any, used: list[int], planned: list[Blend], config: TrainConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the run's sequences.

    Returns:
        [sequences of the run] of PLACE, and int64 [data sets]: how many sequences each data set gives.
    """
    batch = config.global_batch_size
    places = np.empty(config.train_steps * batch, PLACE)
    begin = (planned[1].first_step - 1) * batch
    if isinstance(start, BlendedDataset):
        places["data_set"][:begin] = np.array(used)[start.dataset_index[:begin]]
        places["sequence"][:begin] = start.dataset_sample_index[:begin]
    else:
        places["data_set"][:begin] = used[0]
        places["sequence"][:begin] = np.arange(begin)
    count = len(planned[0].weights)
    taken = np.bincount(places["data_set"][:begin], minlength=count)
    for blend, last in zip(planned[1:], ends(planned, config)[1:], strict=True):
        end = last * batch
        part = places[begin:end]
        part["data_set"] = interleave(blend.shares, end - begin)
        for i in range(count):
            here = np.flatnonzero(part["data_set"] == i)
            part["sequence"][here] = taken[i] + np.arange(len(here))
            taken[i] += len(here)
        begin = end
    return places, taken
