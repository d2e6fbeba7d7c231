"""Sequences of a data set to measure a model on."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_ladder.errors import UserError
from pretrain.data import DataFolder, open_folder


def open_data_for(path: Path, tokenizer_sha256: str, model: str) -> DataFolder:
    """A data set made with the model's tokenizer.

    Raises:
        UserError: it is none, or was made with another.
    """
    folder = open_folder(path)
    if folder.tokenizer["sha256"] != tokenizer_sha256:
        raise UserError(
            f"{path} was tokenized with another tokenizer than that of {model}: ids mean different "
            "things; tokenize with the model's"
        )
    return folder


def held_out_split(folder: DataFolder) -> str:
    """validation, or train where nothing was held out."""
    return "validation" if folder.tokens("validation") else "train"


def sample_sequences(folder: DataFolder, count: int, length: int) -> Tensor:
    """Pieces of the held-out split, at equal distances, one token longer than `length`.

    Returns:
        int64 [count, length + 1]; fewer than `count` when the split holds fewer.

    Raises:
        UserError: it holds none.
    """
    split = held_out_split(folder)
    tokens = np.memmap(folder.prefix(split) + ".bin", dtype=folder.manifest["dtype"], mode="r")
    count = min(count, len(tokens) // (length + 1))
    if count == 0:
        raise UserError(
            f"{folder.path}: the {split} split has {len(tokens):,} tokens, a sequence takes "
            f"{length + 1:,}: take shorter ones or more text"
        )
    starts = np.linspace(0, len(tokens) - length - 1, count).astype(np.int64)
    return torch.stack(
        [torch.from_numpy(tokens[s : s + length + 1].astype(np.int64)) for s in starts]
    )
