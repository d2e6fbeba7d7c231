"""How many tokens attention works on together: a sequence's, or a document's where they are apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ladder.fields.windows import attention_length
from pretrain.config.train import TrainConfig
from pretrain.data.blends import blends, ends
from pretrain.data.folders import DataFolder, open_folder
from pretrain.data.index_file import HEADER_BYTES

MOST_DOCUMENTS = 100_000
"""Documents of a data set whose lengths are counted. Of more, evenly spaced ones are."""


@dataclass(frozen=True)
class Attended:
    """What a plan knows of the sequences and documents of a run, in tokens."""

    mean: float
    """`attention_length`, for FLOPs."""
    longest: int
    """The longest sequence or document that attention works on, for scores in memory."""
    source: str = ""
    """Where the lengths of documents are from, in words. "": documents are not apart."""


def attended(config: TrainConfig, folders: Sequence[DataFolder] = ()) -> Attended:
    """What attention works on in a run's training.

    Documents are cut where sequences end: the lengths in a data set's .idx are cut as if its documents
    followed each other.

    Args:
        folders: the data sets, where they are open already.

    Raises:
        UserError: a data set is damaged.
    """
    length, data = config.data.seq_length, config.data
    whole = Attended(attention_length(config.model, [length]), length)
    if data.attend_across_documents:
        return whole
    if not folders and not (data.paths and all(path.is_dir() for path in data.paths)):
        source = "assumed, as there are no data sets: each sequence is one document"
        return Attended(whole.mean, length, source)
    folders = folders or [open_folder(path) for path in data.paths]
    mean, longest = 0.0, 1
    for folder, share in zip(folders, _shares(config, list(folders)), strict=True):
        if share:
            lengths = _lengths(folder)
            mean += share * attention_length(config.model, pieces(lengths, length))
            longest = max(longest, min(length, int(lengths.max())))
    return Attended(mean, longest, "from the data sets' documents")


def pieces(lengths: np.ndarray, seq_length: int) -> list[int]:
    """The documents of sequences: documents one after another, cut where sequences end.

    Args:
        lengths: tokens of each document, int [documents]; of MOST_DOCUMENTS of them.
    """
    some = lengths[:: -(-len(lengths) // MOST_DOCUMENTS)]
    stops = np.cumsum(some, dtype=np.int64)
    stops = np.union1d(stops, np.arange(seq_length, stops[-1], seq_length))
    return np.diff(stops, prepend=0).tolist()


def _lengths(folder: DataFolder) -> np.ndarray:
    """The tokens of each training document, int32."""
    count = folder.split("train")["documents"]
    return np.memmap(folder.prefix("train") + ".idx", "<i4", "r", HEADER_BYTES, (count,))


def _shares(config: TrainConfig, folders: list[DataFolder]) -> list[float]:
    """The share of each data set in the whole run, over all its blends."""
    planned, shares = blends(config, folders), [0.0] * len(folders)
    for blend, end in zip(planned, ends(planned, config), strict=True):
        steps = end - blend.first_step + 1
        shares = [sum_ + steps * share for sum_, share in zip(shares, blend.shares, strict=True)]
    return [share / config.train_steps for share in shares]
