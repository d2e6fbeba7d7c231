"""Describes the tokenizer of a Hugging Face folder as a data set's manifest does."""

import base64
import logging
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_ladder.errors import UserError
from megatron_ladder.hf.end_ids import end_ids
from megatron_ladder.json_files import is_whole, read_json, short
from pretrain.data.manifests import MOST_IDS
from pretrain.files import sha256

logger = logging.getLogger(__name__)

MOST_BYTES = 256 << 20  # of a tokenizer.json

_MAKE = (
    "`megatron-ladder import` makes a tokenizer.json; or make it with transformers: "
    'AutoTokenizer.from_pretrained("{folder}").save_pretrained("{folder}")'
)


def tokenizer_facts(folder: Path, config: Any, model_folder: Path | None = None) -> dict[str, Any]:
    """Facts about the folder's tokenizer.json, or else its tokenizer.model.

    Args:
        config: the model's configuration, of transformers.
        model_folder: the folder that messages name, if it is another.

    Returns:
        The field `tokenizer` of a data set's manifest.json (docs/reference/formats.md).

    Raises:
        UserError: there is no tokenizer, it cannot be read, its vocabulary is larger than the model's, or
            the model has no token that ends a text. Added tokens may lie beyond the model's.
    """
    eos = next(iter(end_ids(folder)), None)
    for name in ("tokenizer.json", "tokenizer.model"):
        path, named = folder / name, (model_folder or folder) / name
        if not path.is_file():
            continue
        if added := added_to_pieces(folder):
            raise UserError(
                f"{named} does not have all tokens of the model, {some_of(added)} were added: "
                f"{_MAKE.format(folder=folder)}"
            )
        size, beyond = _size(path, config.vocab_size)
        if beyond is None:
            raise UserError(
                f"{named} has {size:,} tokens, the model's vocab_size is {config.vocab_size:,}: the "
                "tokenizer belongs to another model"
            )
        if beyond:
            logger.warning(
                "%s: the model has %d rows and none for %s: what holds such a token is refused",
                *(named, config.vocab_size, some_of(beyond)),
            )
        if eos is None:
            raise UserError(
                f"{folder}: neither config.json nor generation_config.json has an eos_token_id: add the id "
                "of the token that ends a text"
            )
        if eos >= config.vocab_size:
            raise UserError(
                f"{model_folder or folder}: the eos_token_id {eos:,} is none of the model's "
                f"{config.vocab_size:,} ids: correct it in config.json or generation_config.json"
            )
        return {
            "kind": "huggingface" if name.endswith(".json") else "sentencepiece",
            "file": name,
            "sha256": sha256(path),
            "vocab_size": size,
            "eod_id": eos,
        }
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        raise UserError(
            f"{folder} has vocab.json and merges.txt, but no tokenizer.json: "
            f"{_MAKE.format(folder=folder)}"
        )
    raise UserError(
        f"{folder} has no tokenizer: no tokenizer.json and no tokenizer.model: copy the model's there"
    )


def added_to_pieces(folder: Path) -> dict[str, int]:
    """The tokens that a folder without tokenizer.json adds to its SentencePiece model, with their ids.

    transformers reads them from added_tokens.json and tokenizer_config.json. Chat models have some.
    """
    path = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() or not path.is_file():
        return {}
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError:  # `_size` says so
        return {}
    added: dict[str, int] = {}
    if (config := folder / "tokenizer_config.json").is_file():
        fields = (
            read_json(config, "a tokenizer's file", MOST_BYTES).get("added_tokens_decoder") or {}
        )
        try:
            added |= {str(facts["content"]): int(i) for i, facts in fields.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{config} is not a tokenizer's file: {error!r:.200}") from error
    if (config := folder / "added_tokens.json").is_file():
        added |= read_json(config, "a tokenizer's file", MOST_BYTES)
    for token, number in added.items():
        if not is_whole(number, 0, MOST_IDS):
            raise UserError(
                f"{config} is not a tokenizer's file: the token {short(token)} has the id {short(number)}"
            )
    size = model.vocab_size()
    new = {t: i for t, i in added.items() if i >= size or model.IdToPiece(i) != t}
    return dict(sorted(new.items(), key=lambda item: item[1]))


def some_of(tokens: dict[str, int]) -> str:
    """The first tokens with their ids, and how many more there are."""
    first = ", ".join(f"{token} ({i})" for token, i in list(tokens.items())[:5])
    return first + (f" and {len(tokens) - 5} more" if len(tokens) > 5 else "")


def _size(path: Path, vocab_size: int) -> tuple[int, dict[str, int] | None]:
    """The size that holds all ids, and `added_beyond` the model's `vocab_size`."""
    if path.suffix == ".json":
        import tokenizers

        from megatron_ladder.hf.tokenizer import added_beyond

        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"{path} is not a Hugging Face tokenizer.json") from error
        return max(tokenizer.get_vocab(True).values()) + 1, added_beyond(tokenizer, vocab_size)
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        if _is_tiktoken(path):
            raise UserError(
                f"{path} is a file of tiktoken, which has neither the rule that splits text nor the "
                "special tokens: copy the tokenizer.json that is published with the model beside it"
            ) from error
        raise UserError(f"{path} is not a SentencePiece model") from error
    size = model.vocab_size()
    return size, {} if size <= vocab_size else None


def _is_tiktoken(path: Path) -> bool:
    """Lines of a token's bytes in base64 and its rank."""
    with path.open("rb") as file:
        line = file.readline(1000)
    try:
        token, rank = line.split()
        return rank.isdigit() and bool(base64.b64decode(token, validate=True))
    except ValueError:
        return False
