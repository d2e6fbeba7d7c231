"""Validation splits of data sets, opened as they are before the index files are made."""

from pathlib import Path

from torch.utils.data import Dataset

from pretrain.config.train import TrainConfig
from pretrain.data.folders import DataFolder, labels
from pretrain.data.sequences import one_split


def validation_sequences(
    config: TrainConfig, folders: list[DataFolder], cache: Path
) -> dict[str, Dataset]:
    """Each data set's validation split, by the data set's label. Index files that are missing are made."""
    return {
        label: one_split(config, folder, "validation", None, cache, made=False)
        for label, folder in zip(labels(folders), folders, strict=True)
        if folder.validates(config.data.seq_length)
    }
