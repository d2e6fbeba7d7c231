"""From a data set's tokenizer file to the files transformers reads.

A SentencePiece model becomes a `tokenizer.json` that gives the same ids, checked on `SAMPLES`. Known
differences:

- unigram: of two segmentations with the same score, as "ab a" and "a ba" can have, SentencePiece takes
  one by its 32-bit rounding, `tokenizers` by its 64-bit one;
- text that spells a control piece, such as "</s>", is that one token here and ordinary characters in
  SentencePiece; `split_special_tokens=True` gives SentencePiece's ids;
- decoding shows control tokens unless `skip_special_tokens=True`, and an unknown token as "<unk>"
  where SentencePiece writes " ⁇ ";
- a run of byte tokens that is not UTF-8 decodes to one replacement character a byte, the run's valid
  part too.

Encoding adds what was in the training data: nothing, or the token that documents began with. A
Hugging Face `tokenizer.json` is copied as it is where it does so, else its post-processor is changed.
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

# SentencePiece's piece types that matter here; bytes and unused pieces are the others.
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
    """Writes `tokenizer.json` and `tokenizer_config.json`, and keeps a SentencePiece `tokenizer.model`.

    Args:
        tokenizer_file: a SentencePiece `.model` or a Hugging Face `.json`.
        output_dir: an existing folder.
        eos_token_id: the token that ends a document.
        vocab_size: the model's, padding left out.
        max_length: tokens in the model's context.
        begins_with: the token that is put before every text; None: none is.

    Raises:
        UserError: the file cannot be read, has no such token, has more tokens than the model, or
            SentencePiece and the converted tokenizer disagree on a sample.
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
    if tokenizer.get_vocab_size() > vocab_size:
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
    old = fields["post_processor"] or {}
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
    """Raises UserError when transformers, reading `folder`, disagrees with SentencePiece on a sample."""
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
    """Whether both are segmentations of one text that differ in score by 32-bit rounding only.

    Never so for BPE, whose scores are ranks and do not add up to anything.
    """
    proto = ModelProto.FromString(reference.serialized_model_proto())
    if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
        return False
    scores = [sum(proto.pieces[i].score for i in some) for some in (ids, expected)]
    same_text = reference.decode(ids) == reference.decode(expected)
    return same_text and math.isclose(*scores, rel_tol=1e-5)


def sentencepiece_to_tokenizers(proto: Any) -> Tokenizer:
    """The same tokenizer as a `tokenizers` object.

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
    # Spaces become "▁" before anything else looks at the text.
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
    # SentencePiece takes these whole too, and does not normalise them; one with a space in it is never
    # found, as spaces have become "▁" by then. A dummy prefix would be added again after each of
    # them: `check_same_ids` refuses that pair.
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, special=False, normalized="▁" in piece.piece)
            for piece in proto.pieces
            if piece.type == _USER_DEFINED and " " not in piece.piece
        ]
    )
    return tokenizer


def _bpe(proto: Any) -> models.BPE:
    """SentencePiece merges the neighbours whose union scores best; `tokenizers` wants merges ranked.

    So every way to cut a piece in two pieces is a merge, ranked as the piece is. Only normal pieces
    are made by merging: text that spells "<0x41>" is not that byte.
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
    """Unigram on both sides; SentencePiece finds only normal pieces in text.

    `tokenizers` would also find the spelling of a byte or a control piece: a score that no other cut
    of the text is worse than keeps it from them.
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
