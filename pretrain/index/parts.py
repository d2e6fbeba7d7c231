"""The parts that a run's index files are made in, each by one process.

megatron-core decides the names of the files and what is in them. A part's names are learned by opening its
data set as training does, with the reading of the index files put off.
"""

import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_dataset import BlendedDataset

from pretrain.config.train import TrainConfig
from pretrain.data.folders import DataFolder
from pretrain.data.sequences import first_blend, one_split, train_sequences

_MARKS = 256


@dataclass(frozen=True, eq=False)
class SplitPart:
    """The files of one split of a data set: the order of its documents, and where each sequence begins."""

    folder: DataFolder
    split: str
    samples: int | None
    """Sequences that the run reads of it, with some to spare; None: one epoch."""
    files: tuple[Path, ...]
    tokens: int
    """In all epochs."""
    memory: int
    """About the bytes that making it needs."""

    @property
    def what(self) -> str:
        return self.folder.prefix(self.split)

    def make(self, config: TrainConfig, folders: list[DataFolder], target: Path) -> None:
        one_split(config, self.folder, self.split, self.samples, target, made=False)


@dataclass(frozen=True, eq=False)
class OrderPart:
    """The files of a blend: of which data set each sequence of the run is.

    megatron-core draws them up sequence by sequence, and compares all data sets for each. With 1,000 data
    sets this takes longer than all other parts. It needs the weights alone, so it is made beside them.
    """

    weights: tuple[float, ...]
    size: int
    """Sequences of the run."""
    available: tuple[int, ...]
    """Of each data set, sequences."""
    description: str
    files: tuple[Path, ...]
    shared: mmap.mmap = field(repr=False)
    """The order, int16 [size], in memory that the process which waits can see too."""
    what = "the order of the data sets"
    tokens = 0

    @property
    def memory(self) -> int:
        return 10 * self.size

    def begin(self) -> None:
        """Call it before the process that makes the part is forked."""
        self._marks()[:] = -1

    def share_done(self) -> float:
        return float(np.mean(self._marks() >= 0))

    def _order(self) -> np.ndarray:
        return np.frombuffer(self.shared, np.int16, self.size)

    def _marks(self) -> np.ndarray:
        return self._order()[:: -(-self.size // _MARKS)]

    def make(self, config: TrainConfig, folders: list[DataFolder], target: Path) -> None:
        order, sequence = self._order(), np.zeros(self.size, np.int64)
        count = len(self.weights)
        helpers.build_blending_indices(order, sequence, list(self.weights), count, self.size, False)
        taken = np.zeros(count, np.int64)
        for start in range(0, self.size, 1 << 24):
            taken += np.bincount(order[start : start + (1 << 24)], minlength=count)
        for used, there in zip(taken, self.available, strict=True):
            assert used <= there, f"the blend takes {used} sequences of a data set that has {there}"
        of_data_set, of_sequence, description = (target / file.name for file in self.files)
        np.save(of_data_set, order)
        np.save(of_sequence, sequence)
        description.write_text(self.description)


@dataclass(frozen=True, eq=False)
class PhasesPart:
    """The files of a run with several stretches (phased.py), which are made of all the others."""

    size: int
    files: tuple[Path, ...] = ()
    """Not known before they are made."""
    what = "the order of the data sets after a change of the run"
    tokens = 0

    @property
    def memory(self) -> int:
        return 40 * self.size

    def make(self, config: TrainConfig, folders: list[DataFolder], target: Path) -> None:
        train_sequences(config, folders, target)


Part = SplitPart | OrderPart | PhasesPart


def index_parts(config: TrainConfig, folders: list[DataFolder], cache: Path) -> list[Part]:
    """The parts that do not need each other. With several stretches, a `PhasesPart` comes after them.

    Args:
        cache: the folder of the index files. Nothing in it is read.
    """
    opened: Any = first_blend(config, folders, cache, made=True)
    is_blend = isinstance(opened, BlendedDataset)
    used = {folder.prefix("train"): folder for folder in folders}
    parts: list[Part] = [
        _split_part(used[dataset.dataset_path], "train", dataset, config)
        for dataset in (opened.datasets if is_blend else [opened])
    ]
    if is_blend:
        size, taken = opened.size, [part for part in parts if isinstance(part, SplitPart)]
        parts.append(
            OrderPart(
                weights=tuple(opened.weights),
                size=size,
                available=tuple((p.tokens - 1) // config.data.seq_length for p in taken),
                description=opened.unique_description,
                files=(
                    Path(opened.path_to_dataset_index),
                    Path(opened.path_to_dataset_sample_index),
                    _description(opened.path_to_dataset_index, "dataset_index"),
                ),
                shared=mmap.mmap(-1, 2 * size),
            )
        )
    for folder in folders:
        if folder.validates(config.data.seq_length):
            held_out: Any = one_split(config, folder, "validation", None, cache, made=True)
            parts.append(_split_part(folder, "validation", held_out, config))
    return parts


def _split_part(folder: DataFolder, split: str, opened: Any, config: TrainConfig) -> SplitPart:
    tokens, length = folder.tokens(split), config.data.seq_length
    # As many epochs as hold the samples; the last sequence needs one token more, which is its last label.
    epochs = 1 if opened.num_samples is None else -(-(opened.num_samples * length + 1) // tokens)
    documents = folder.manifest["splits"][split]["documents"]
    names = ("document_index", "sample_index", "shuffle_index")
    paths = [str(getattr(opened, f"path_to_{name}")) for name in names]
    return SplitPart(
        folder,
        split,
        opened.num_samples,
        files=(*map(Path, paths), _description(paths[0], names[0])),
        tokens=epochs * tokens,
        memory=(12 + 24 * epochs) * documents + 24 * epochs * tokens // length,
    )


def _description(path: str, name: str) -> Path:
    """megatron-core's text beside an index file. It gets its name last: it stands for the whole part."""
    return Path(path.removesuffix(f"{name}.npy") + "description.txt")
