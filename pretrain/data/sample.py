"""Takes sequences of a data set to measure a model on."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_ladder.errors import UserError
from pretrain.data.folders import DataFolder, has_ids_of


def check_tokenizer(folder: DataFolder, tokenizer_file: Path, model: Path) -> None:
    """Refuses a data set that was made with another tokenizer than the model's.

    An exported folder has a SentencePiece tokenizer twice, as tokenizer.model and as tokenizer.json. Both
    give the same ids, so the data set's tokenizer may be either.

    Args:
        tokenizer_file: the model's tokenizer.
        model: the model's folder, for the message.

    Raises:
        UserError: the data set has another tokenizer.
    """
    own = [tokenizer_file.with_name(name) for name in ("tokenizer.model", "tokenizer.json")]
    if not any(has_ids_of(folder, file) for file in own if file.is_file()):
        raise UserError(
            f"{folder.path} was tokenized with another tokenizer than that of {model}: the same id means "
            f"different tokens. Tokenize the text with {tokenizer_file}"
        )


def held_out_split(folder: DataFolder) -> str:
    """The split to measure on: "validation", or "train" when the data set has no validation split."""
    return "validation" if folder.tokens("validation") else "train"


def sample_sequences(folder: DataFolder, count: int, length: int) -> Tensor:
    """Takes sequences at equal distances from the held-out split.

    Args:
        length: tokens of a sequence; each gets one token more, as the last label.

    Returns:
        int64 [count, length + 1]; fewer than `count` when the split has fewer.

    Raises:
        UserError: the split is shorter than one sequence.
    """
    split = held_out_split(folder)
    tokens = np.memmap(folder.prefix(split) + ".bin", dtype=folder.manifest["dtype"], mode="r")
    count = min(count, len(tokens) // (length + 1))
    if count == 0:
        raise UserError(
            f"{folder.path}: the {split} split has {len(tokens):,} tokens, a sequence takes "
            f"{length + 1:,}: use shorter sequences or more text"
        )
    starts = np.linspace(0, len(tokens) - length - 1, count).astype(np.int64)
    return torch.stack(
        [torch.from_numpy(tokens[s : s + length + 1].astype(np.int64)) for s in starts]
    )
