"""Sequences of a data set to measure a model on."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_ladder.errors import UserError
from pretrain.data.folders import DataFolder
from pretrain.data.tokenizer_facts import has_ids_of


def check_tokenizer(folder: DataFolder, tokenizer_file: Path, model: Path) -> None:
    """Refuses a data set that was made with a tokenizer that is not the model's.

    An exported folder has the tokenizer it was trained with twice where that is SentencePiece's, as
    tokenizer.model and as tokenizer.json: the ids are the same.

    Raises:
        UserError: it was.
    """
    own = [tokenizer_file.with_name(name) for name in ("tokenizer.model", "tokenizer.json")]
    if not any(has_ids_of(folder, file) for file in own if file.is_file()):
        raise UserError(
            f"{folder.path} was tokenized with another tokenizer than that of {model}: ids mean "
            f"different things; tokenize the text with {tokenizer_file}"
        )


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
