"""Opens a run's data sets, and checks that they fit each other, the model and the sequence length."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_ladder.errors import UserError
from pretrain.config.train import TrainConfig
from pretrain.data.blends import check_blends
from pretrain.data.folders import DataFolder, open_folder, same_ids
from pretrain.ranks import is_first_rank

logger = logging.getLogger(__name__)

MOST_DATA_SETS = 32_766
"""megatron-core numbers the data sets of a blend in 16 bits."""
MOST_DOCUMENTS = 2**31 - 1
"""It numbers the documents of a split in 32 bits. Higher numbers would wrap, without a message."""


def with_vocab_size(config: TrainConfig, folders: Sequence[DataFolder] = ()) -> TrainConfig:
    """The configuration with model.vocab_size: where it is not given, that of the first data set.

    Args:
        folders: the data sets, where they are open already.
    """
    if config.model.vocab_size is not None or not config.data.paths:
        return config
    first = folders[0] if folders else open_folder(config.data.paths[0])
    vocab_size = first.tokenizer["vocab_size"]
    return replace(config, model=replace(config.model, vocab_size=vocab_size))


def open_data(config: TrainConfig) -> list[DataFolder]:
    """Opens the run's data sets.

    Raises:
        UserError: a data set is missing or damaged, or the data sets do not fit each other, the blends, the
            model's vocabulary or data.seq_length.
    """
    if not config.data.paths:
        raise UserError("no data: give --data.paths FOLDER made by `megatron-ladder data tokenize`")
    check_blends(config)
    if len(config.data.paths) > MOST_DATA_SETS:
        raise UserError(
            f"data.paths has {len(config.data.paths):,} data sets, megatron-core blends at most "
            f"{MOST_DATA_SETS:,}: make fewer and larger ones"
        )
    folders = [open_folder(path) for path in config.data.paths]
    for folder in folders:
        _check_counts(folder)
    first = folders[0]
    for other in folders[1:]:
        if not same_ids(first, other):
            raise UserError(
                f"{other.path} and {first.path} were tokenized with different tokenizers: the same id "
                "means different tokens in them. Tokenize one of them again"
            )
        if other.tokenizer.get("bos_id") != first.tokenizer.get("bos_id"):
            with_bos, without = sorted((first, other), key=lambda f: "bos_id" not in f.tokenizer)
            raise UserError(
                f"the documents of {with_bos.path} begin with a BOS token, those of {without.path} do not: "
                "tokenize one of them again, both with --add-bos or both without"
            )
    if config.model.vocab_size is not None:
        check_ids(folders, config.model.vocab_size)
    needed = config.data.seq_length + 1
    for folder in folders:
        if folder.tokens("train") < needed:
            raise UserError(
                f"{folder.path}: the train split has {folder.tokens('train'):,} tokens, one sequence "
                f"takes data.seq_length + 1 = {needed:,}: add text or lower data.seq_length"
            )
        if 0 < folder.tokens("validation") < needed and is_first_rank():
            logger.warning(
                "%s: no validation. Its validation split has %s tokens, one sequence takes data.seq_length "
                "+ 1 = %s. For one, tokenize with a larger --validation-fraction, or lower data.seq_length",
                *(folder.path, f"{folder.tokens('validation'):,}", f"{needed:,}"),
            )
    return folders


def _check_counts(folder: DataFolder) -> None:
    for name, facts in folder.manifest["splits"].items():
        if facts["documents"] > MOST_DOCUMENTS:
            sets = -(-facts["documents"] // MOST_DOCUMENTS)
            raise UserError(
                f"{folder.path}: the {name} split has {facts['documents']:,} documents, megatron-core "
                f"numbers at most {MOST_DOCUMENTS:,}. Make {sets} data sets of it: run `megatron-ladder "
                "data tokenize` once for each, with some of the input files and a folder of its own, and "
                "give all of them to --data.paths"
            )


def check_ids(folders: list[DataFolder], vocab_size: int) -> None:
    """Refuses data sets with ids for which the model has no row.

    A tokenizer may have added tokens beyond the model's rows. Then the data sets, which have the same
    tokenizer, are read to see whether they use one. Called by every rank; the first one reads.

    Raises:
        UserError: the vocabulary is larger than `vocab_size`, or one of these tokens is used.
    """
    first = folders[0]
    size, kind = first.tokenizer["vocab_size"], first.tokenizer["kind"]
    if size <= vocab_size:
        return
    beyond = None
    if kind == "huggingface":
        # Imported where needed: it imports transformers.
        from tokenizers import Tokenizer

        from megatron_ladder.hf.tokenizer import added_beyond

        file = first.path / first.tokenizer["file"]
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"{file} cannot be read ({error}): copy the data set again") from error
        beyond = added_beyond(tokenizer, vocab_size)
    if beyond is None:
        raise UserError(
            f"{first.path} has a vocabulary of {size:,} ids, the model only "
            f"{vocab_size:,} (model.vocab_size): raise that, or tokenize the text with the "
            "model's tokenizer"
        )
    if not is_first_rank():
        return
    tokens = {i: token for token, i in beyond.items()}
    for folder in folders:
        for split in folder.manifest["splits"]:
            if (largest := _largest_id(folder, split)) >= vocab_size:
                raise UserError(
                    f"{folder.path}: the {split} split holds the token {tokens.get(largest, '')} with the "
                    f"id {largest:,}, the model's ids end at {vocab_size - 1:,} (model.vocab_size): "
                    "tokenize text without it, or train a model with more ids"
                )


def _largest_id(folder: DataFolder, split: str) -> int:
    tokens = np.memmap(folder.prefix(split) + ".bin", dtype=folder.manifest["dtype"], mode="r")
    parts = (tokens[start : start + (1 << 24)] for start in range(0, len(tokens), 1 << 24))
    return max((int(part.max()) for part in parts), default=0)
