"""The BOS token of a tokenizer: what documents begin with when it is asked for."""

import json
from pathlib import Path

import tokenizers

from data_prep.encode.encoders import Encoder
from data_prep.errors import UserError

USUAL = ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "<|startoftext|>")


def find_bos(path: Path, encoder: Encoder) -> int:
    """Its id: what the tokenizer itself puts before a text, else what is called its BOS token.

    Raises:
        UserError: it has none.
    """
    if encoder.kind == "sentencepiece":
        import sentencepiece

        found: int | None = sentencepiece.SentencePieceProcessor(model_file=str(path)).bos_id()
        found = None if found == -1 else found
    else:
        found = _of_json(path)
    if found is None:
        raise UserError(
            f"--add-bos: tokenizer {path} has no BOS token: its post-processor adds none, no "
            f"tokenizer_config.json beside it names one, and it has none of {' '.join(USUAL)}"
        )
    return found


def _of_json(path: Path) -> int | None:
    model = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    model.no_truncation()
    model.no_padding()
    whole, alone = model.encode("a").ids, model.encode("a", add_special_tokens=False).ids
    if whole[:1] != alone[:1]:
        return whole[0]
    beside = path.parent / "tokenizer_config.json"
    try:
        named = json.loads(beside.read_text(encoding="utf-8")).get("bos_token")
    except (OSError, ValueError, AttributeError):
        named = None
    named = named.get("content") if isinstance(named, dict) else named
    names = [named] if isinstance(named, str) else list(USUAL)
    return next((i for name in names if (i := model.token_to_id(name)) is not None), None)
