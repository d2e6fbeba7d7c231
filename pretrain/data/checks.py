"""Opens a run's data sets, and checks that they fit each other, the model and the sequence length."""

from dataclasses import replace

from megatron_ladder.errors import UserError
from pretrain.config.train import TrainConfig
from pretrain.data.blends import check_blends
from pretrain.data.folders import DataFolder, open_folder


def with_vocab_size(config: TrainConfig) -> TrainConfig:
    """The configuration with model.vocab_size: where it is not given, that of the first data set."""
    if config.model.vocab_size is not None or not config.data.paths:
        return config
    vocab_size = open_folder(config.data.paths[0]).tokenizer["vocab_size"]
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
    folders = [open_folder(path) for path in config.data.paths]
    first = folders[0]
    for other in folders[1:]:
        if other.tokenizer["sha256"] != first.tokenizer["sha256"]:
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
    vocab_size = first.tokenizer["vocab_size"]
    if config.model.vocab_size is not None and vocab_size > config.model.vocab_size:
        raise UserError(
            f"{first.path} has a vocabulary of {vocab_size:,} ids, the model only "
            f"{config.model.vocab_size:,} (model.vocab_size): raise that, or tokenize the text with the "
            "model's tokenizer"
        )
    needed = config.data.seq_length + 1
    for folder in folders:
        if folder.tokens("train") < needed:
            raise UserError(
                f"{folder.path}: the train split has {folder.tokens('train'):,} tokens, one sequence "
                f"takes data.seq_length + 1 = {needed:,}: add text or lower data.seq_length"
            )
        if 0 < folder.tokens("validation") < needed:
            raise UserError(
                f"{folder.path}: the validation split has {folder.tokens('validation'):,} tokens, one "
                f"sequence takes data.seq_length + 1 = {needed:,}: tokenize with a larger "
                "validation fraction or lower data.seq_length"
            )
    return folders
