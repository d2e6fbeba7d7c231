"""Makes the tokenizer files that transformers reads, from the tokenizer file of a data set.

A SentencePiece model becomes a `tokenizer.json` that gives the same ids. This is checked on `SAMPLES`.
Known differences:

- Unigram models: two segmentations, such as "ab a" and "a ba", can have the same score. Then rounding
  decides. SentencePiece computes with 32 bits and `tokenizers` with 64, so they may choose differently.
- Text that spells a control piece, such as "</s>", becomes that one token here. In SentencePiece it is
  ordinary characters. `split_special_tokens=True` gives SentencePiece's ids.
- Decoding shows control tokens unless `skip_special_tokens=True`. An unknown token is "<unk>", where
  SentencePiece writes " ⁇ ".
- A run of byte tokens that is not valid UTF-8 decodes to one replacement character for each byte, also for
  the part of the run that is valid.

Encoding adds what was in the training data: nothing, or the token that documents began with. A Hugging
Face `tokenizer.json` that does so already is copied unchanged; otherwise its post-processor is changed.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer

from megatron_ladder.errors import UserError

SAMPLES = (
    "",
    " ",
    "Hello, world!",
    "  two leading and two trailing  ",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "def f(x):\n    if x > 0:\n        return x ** 2\n\n\n    return [i for i in range(10)]\n",
    "\tif (a != NULL) {\n\t\tfree(a);\t// done\n\t}\r\n",
    "a" + " " * 17 + "b" + "\n" * 5 + " " * 64 + "c",
    "x = 1234567890 * 3.14159e-10 # 007",
    "snake_case CamelCase kebab-case SCREAMING_CASE __dunder__ path/to/file.py",
    "<0x41> <0x0A> <unknown> </html> <|token|>",
    "naïve café Ünïcödé Straße; Ελληνικά; Русский текст; 日本語のテキスト; 한국어; العربية",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u00a0\u2003\u200b\ufeff ▁ \u2028",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa abababababababab ===================",
    "\x00\x01\x1b[0m",
)

# The piece types of SentencePiece that this file uses. The other types are bytes and unused pieces.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


def write_tokenizer(
    tokenizer_file: Path,
    output_dir: Path,
    *,
    eos_token_id: int,
    vocab_size: int,
    max_length: int,
    begins_with: int | None = None,
) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, and copies a SentencePiece model as well.

    Args:
        tokenizer_file: a SentencePiece `.model` or a Hugging Face `.json`.
        output_dir: an existing folder.
        eos_token_id: the token that ends a document.
        vocab_size: the model's vocabulary size, without padding.
        max_length: tokens in the model's context.
        begins_with: the token that is put before every text; None: none is.

    Raises:
        UserError: the file cannot be read, does not have `eos_token_id`, or has more tokens than the model.
            Or the converted tokenizer gives other ids or text for a sample than SentencePiece does.
    """
    if not tokenizer_file.is_file():
        raise UserError(f"tokenizer {tokenizer_file} does not exist")
    is_sentencepiece = tokenizer_file.suffix == ".model"
    if is_sentencepiece:
        proto = _read_sentencepiece(tokenizer_file)
        tokenizer = sentencepiece_to_tokenizers(proto)
        special_ids = {"unk_token": proto.trainer_spec.unk_id}
        if proto.trainer_spec.bos_id >= 0:
            special_ids["bos_token"] = proto.trainer_spec.bos_id
        if proto.trainer_spec.pad_id >= 0:
            special_ids["pad_token"] = proto.trainer_spec.pad_id
    else:
        try:
            tokenizer = Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:  # tokenizers raises Exception itself
            raise UserError(f"{tokenizer_file} is not a Hugging Face tokenizer: {error}") from error
        special_ids = {}
    special_ids["eos_token"] = eos_token_id
    if begins_with is not None:
        special_ids["bos_token"] = begins_with
    if added_beyond(tokenizer, vocab_size) is None:
        raise UserError(
            f"{tokenizer_file} has {tokenizer.get_vocab_size()} tokens and the model {vocab_size}: "
            "this is not the tokenizer it was trained with"
        )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    for name, token_id in special_ids.items():
        token = tokenizer.id_to_token(token_id)
        if token is None:
            raise UserError(f"{tokenizer_file} has no token {token_id} to be its {name}")
        config[name] = token
    if is_sentencepiece:
        shutil.copyfile(tokenizer_file, output_dir / "tokenizer.model")
        tokenizer.save(str(output_dir / "tokenizer.json"))
    else:
        shutil.copyfile(tokenizer_file, output_dir / "tokenizer.json")
    set_beginning(output_dir / "tokenizer.json", begins_with)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (output_dir / "tokenizer_config.json").write_text(text, encoding="utf-8")
    if is_sentencepiece:
        check_same_ids(tokenizer_file, output_dir)


def added_beyond(tokenizer: Tokenizer, vocab_size: int) -> dict[str, int] | None:
    """The tokens for which a model of `vocab_size` rows has no row, in the order of their ids.

    Many published tokenizers have some: a [PAD] or <image> was added after the model was trained.

    Returns:
        The ids by token. None: a token of the vocabulary itself is among them, so that the tokenizer
        belongs to another model.
    """
    beyond = {t: i for t, i in tokenizer.get_vocab(True).items() if i >= vocab_size}
    if any(token in beyond for token in tokenizer.get_vocab(False)):
        return None
    return dict(sorted(beyond.items(), key=lambda item: item[1]))


def set_beginning(path: Path, bos_id: int | None) -> None:
    """Has a tokenizer.json put this token before every text, and nothing else before or after it."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    if tokenizer.encode("a").ids == [
        *([] if bos_id is None else [bos_id]),
        *tokenizer.encode("a", add_special_tokens=False).ids,
    ]:
        return
    fields = json.loads(path.read_text(encoding="utf-8"))
    old = fields.get("post_processor") or {}
    steps = old["processors"] if old.get("type") == "Sequence" else [old]
    steps = [step for step in steps if step.get("type") == "ByteLevel"]  # it adds no token
    if bos_id is not None:
        bos = tokenizer.id_to_token(bos_id)
        assert bos is not None, bos_id  # `write_tokenizer` has looked
        steps.append(_template(bos, bos_id))
    fields["post_processor"] = {"type": "Sequence", "processors": steps} if steps else None
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False), encoding="utf-8")


def _template(bos: str, bos_id: int) -> dict[str, Any]:
    """tokenizers' TemplateProcessing, as tokenizer.json has it."""
    parts = [
        [
            {"SpecialToken": {"id": bos, "type_id": number}},
            {"Sequence": {"id": name, "type_id": number}},
        ]
        for number, name in enumerate("AB")
    ]
    return {
        "type": "TemplateProcessing",
        "single": parts[0],
        "pair": [*parts[0], *parts[1]],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def check_same_ids(sentencepiece_file: Path, folder: Path) -> None:
    """Checks on `SAMPLES` that the tokenizer in `folder` gives the same ids and text as SentencePiece.

    Raises:
        UserError: for a sample it does not.
    """
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
    for text in SAMPLES:
        expected, ids = reference.encode(text), tokenizer.encode(text, add_special_tokens=False)
        if ids != expected and not _equally_good(reference, ids, expected):
            raise UserError(
                f"{sentencepiece_file} cannot be exported: the converted tokenizer gives {ids} for "
                f"{text!r}, where SentencePiece gives {expected}"
            )
        decoded = tokenizer.decode(ids)
        if reference.unk_id() not in ids and decoded != reference.decode(ids):
            raise UserError(
                f"{sentencepiece_file} cannot be exported: the converted tokenizer decodes "
                f"{text!r} to {decoded!r}, where SentencePiece gives {reference.decode(ids)!r}"
            )


def _equally_good(
    reference: sentencepiece.SentencePieceProcessor, ids: list[int], expected: list[int]
) -> bool:
    """Whether both are segmentations of one text whose scores differ only by 32-bit rounding.

    For BPE this is always False: its scores are ranks, and their sum means nothing.
    """
    proto = ModelProto.FromString(reference.serialized_model_proto())
    if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
        return False
    scores = [sum(proto.pieces[i].score for i in some) for some in (ids, expected)]
    same_text = reference.decode(ids) == reference.decode(expected)
    return same_text and math.isclose(*scores, rel_tol=1e-5)


def sentencepiece_to_tokenizers(proto: Any) -> Tokenizer:
    """Converts a SentencePiece model to a `tokenizers` object.

    Args:
        proto: a SentencePiece ModelProto.

    Raises:
        UserError: it is neither BPE nor unigram.
    """
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type == trainer.BPE:
        model: Any = _bpe(proto)
    elif trainer.model_type == trainer.UNIGRAM:
        model = _unigram(proto)
    else:
        raise UserError(
            "this SentencePiece model is neither bpe nor unigram: it cannot be exported"
        )
    tokenizer = Tokenizer(model)
    # The normalizer replaces spaces by "▁" before the text is cut into pieces.
    steps: list[Any] = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer.add_dummy_prefix:
        back.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(back)
    tokenizer.add_special_tokens(
        [
            AddedToken(piece.piece, special=True, normalized=False)
            for piece in proto.pieces
            if piece.type in (_UNKNOWN, _CONTROL)
        ]
    )
    # SentencePiece also keeps these pieces whole and does not normalise them. It never finds a piece that
    # has a space in it, because by then spaces have become "▁". `tokenizers` would add the dummy prefix
    # again after each such piece: `check_same_ids` refuses a model that has both.
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, special=False, normalized="▁" in piece.piece)
            for piece in proto.pieces
            if piece.type == _USER_DEFINED and " " not in piece.piece
        ]
    )
    return tokenizer


def _bpe(proto: Any) -> models.BPE:
    """Converts a BPE model.

    SentencePiece merges the two neighbours whose union has the best score. `tokenizers` needs a ranked list
    of merges. So every way to cut a piece into two pieces becomes a merge, with the rank of the piece. Only
    normal pieces are made by merges: text that spells "<0x41>" is not that byte.
    """
    mergeable = {p.piece: p.score for p in proto.pieces if p.type == _NORMAL}
    merges = [
        (-score, cut, (piece[:cut], piece[cut:]))
        for piece, score in mergeable.items()
        for cut in range(1, len(piece))
        if piece[:cut] in mergeable and piece[cut:] in mergeable
    ]
    merges.sort(key=lambda merge: merge[:2])
    return models.BPE(
        vocab={p.piece: i for i, p in enumerate(proto.pieces)},
        merges=[pair for _, _, pair in merges],
        unk_token=proto.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _unigram(proto: Any) -> models.Unigram:
    """Converts a unigram model.

    SentencePiece finds only normal pieces in text. `tokenizers` would also find text that spells a byte
    piece or a control piece. So these pieces get a score so low that any other segmentation of the text
    is better.
    """
    worst = min(p.score for p in proto.pieces if p.type == _NORMAL)
    never = 1000 * (worst - 1)
    return models.Unigram(
        vocab=[(p.piece, p.score if p.type == _NORMAL else never) for p in proto.pieces],
        unk_id=proto.trainer_spec.unk_id,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _read_sentencepiece(path: Path) -> Any:
    proto = ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError
        raise UserError(f"{path} is not a SentencePiece model: {error}") from error
    if not proto.pieces:
        raise UserError(f"{path} is not a SentencePiece model: it has no pieces")
    return proto
