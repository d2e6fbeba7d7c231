"""The tokenizer of a model's folder: as it lies there, or made of older files by transformers."""

import logging
import shutil
from pathlib import Path

from transformers import AutoTokenizer

from megatron_ladder.errors import UserError
from pretrain.data.tokenizer_facts import added_to_pieces

logger = logging.getLogger(__name__)

_READ = ("tokenizer.json", "tokenizer.model")
# Older folders of byte-level BPE models (GPT-2, Qwen2) have these two instead.
_OLDER = ("vocab.json", "merges.txt")
# Of tokenizers that are not read: Mistral's, Qwen's first, BERT's, T5's.
_OTHERS = ("tekken.json", "*.tiktoken", "vocab.txt", "spiece.model", *_OLDER)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer in a form that is read as it is."""
    return any((folder / name).is_file() for name in _READ)


def folder_with_tokenizer(source: Path, scratch: Path) -> Path | None:
    """Where the tokenizer of a model can be read.

    Args:
        source: the model's folder.
        scratch: an empty folder. A tokenizer.json is made there, by transformers, where it is needed.

    Returns:
        `source` or `scratch`; None: there is no tokenizer that can be read, which is said in the log.

    Raises:
        UserError: transformers cannot make a tokenizer of the older files.
    """
    if has_tokenizer(source) and not added_to_pieces(source):
        return source
    if (source / "tokenizer.model").is_file():
        _make(source, scratch, "tokenizer.model")
        return scratch
    if all((source / name).is_file() for name in _OLDER):
        _make(source, scratch, "vocab.json and merges.txt")
        return scratch
    others = sorted({path.name for pattern in _OTHERS for path in source.glob(pattern)})
    logger.warning(
        "%s has no tokenizer.json and no tokenizer.model%s: the weights are imported without a tokenizer, "
        "so generating, serving and evaluating text will ask for one",
        *(source, f" ({', '.join(others)} cannot be read)" if others else ""),
    )
    return None


def _make(source: Path, scratch: Path, of: str) -> None:
    for path in (p for pattern in ("*.json", "*.txt", "*.model") for p in source.glob(pattern)):
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, scratch / path.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            scratch, trust_remote_code=False, local_files_only=True
        )
        tokenizer.backend_tokenizer.save(str(scratch / "tokenizer.json"))
    except Exception as error:  # what transformers raises depends on the class
        reason = str(error).strip().split("\n")[0].rstrip(": ")
        raise UserError(
            f"{source}: transformers cannot make a tokenizer.json of {of} ({reason}): name the model's "
            "class as tokenizer_class in tokenizer_config.json, such as LlamaTokenizer, GPT2Tokenizer or "
            "Qwen2Tokenizer, or copy a tokenizer.json there"
        ) from error
