"""Describes the tokenizer of a Hugging Face folder as a data set's manifest does."""

import json
from pathlib import Path
from typing import Any

from megatron_ladder.errors import UserError
from megatron_ladder.hf.end_ids import end_ids
from pretrain.data.folders import DataFolder
from pretrain.files import sha256


def tokenizer_facts(folder: Path, config: Any) -> dict[str, Any]:
    """Facts about the folder's tokenizer.json, or else its tokenizer.model.

    Args:
        config: the model's configuration, of transformers.

    Returns:
        The field `tokenizer` of a data set's manifest.json (docs/reference/formats.md).

    Raises:
        UserError: there is no tokenizer, it cannot be read, it has more tokens than the model, or the model
            has no token that ends a text.
    """
    eos = next(iter(end_ids(folder)), None)
    for name in ("tokenizer.json", "tokenizer.model"):
        path = folder / name
        if not path.is_file():
            continue
        size = _size(path)
        if size > config.vocab_size:
            raise UserError(
                f"{path} has {size:,} tokens, the model's vocab_size is {config.vocab_size:,}: the "
                "tokenizer belongs to another model"
            )
        if eos is None:
            raise UserError(
                f"{folder}: neither config.json nor generation_config.json has an eos_token_id: add the id "
                "of the token that ends a text"
            )
        return {
            "kind": "huggingface" if name.endswith(".json") else "sentencepiece",
            "file": name,
            "sha256": sha256(path),
            "vocab_size": size,
            "eod_id": eos,
        }
    raise UserError(f"{folder} has no tokenizer: no tokenizer.json and no tokenizer.model")


def has_ids_of(data: DataFolder, file: Path) -> bool:
    """Whether a data set was made with this tokenizer.

    A tokenizer.json may put another token before a text than the data set's does: `export` writes what
    training began documents with. The text's own ids are the same.
    """
    if data.tokenizer["sha256"] == sha256(file):
        return True
    theirs = data.path / data.tokenizer["file"]
    if not theirs.is_file() or {file.suffix, theirs.suffix} != {".json"}:
        return False
    return _text_alone(theirs) == _text_alone(file)


def _text_alone(path: Path) -> dict[str, Any]:
    fields = json.loads(path.read_text(encoding="utf-8"))
    return {k: v for k, v in fields.items() if k not in ("post_processor", "padding", "truncation")}


def _size(path: Path) -> int:
    if path.suffix == ".json":
        import tokenizers

        try:
            vocabulary = tokenizers.Tokenizer.from_file(str(path)).get_vocab(True)
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"{path} is not a Hugging Face tokenizer.json") from error
        return max(vocabulary.values()) + 1
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise UserError(f"{path} is not a SentencePiece model") from error
    return model.vocab_size()
