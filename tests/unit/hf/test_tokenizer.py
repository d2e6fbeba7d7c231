"""Exported tokenizers against SentencePiece itself."""

import json
import math
import random

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_ladder.errors import UserError
from megatron_ladder.hf import tokenizer as tokenizer_module
from megatron_ladder.hf.tokenizer import SAMPLES, check_same_ids, write_tokenizer
from tests.unit.hf import tiny


def write(source, folder, **changes):
    folder.mkdir()
    options = {"eos_token_id": 2, "vocab_size": tiny.VOCAB, "max_length": 10**6} | changes
    write_tokenizer(source, folder, **options)
    return AutoTokenizer.from_pretrained(folder)


def texts():
    draw = random.Random(0)
    alphabet = "ab  \n\t.()=_x19é🙂<>/▁日"  # cannot spell a control piece
    yield from SAMPLES
    for _ in range(500):
        yield "".join(draw.choice(alphabet) for _ in range(draw.randrange(80)))


def assert_same(ours, source):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(source))
    ties = 0
    for text in texts():
        ids, expected = ours.encode(text), reference.encode(text)
        if ids != expected:  # unigram segmentations of one score: see tokenizer.py
            assert reference.decode(ids) == reference.decode(expected)
            scores = [sum(map(reference.get_score, some)) for some in (ids, expected)]
            assert math.isclose(*scores, rel_tol=1e-5), text
            ties += 1
        if reference.unk_id() not in ids:
            assert ours.decode(ids) == reference.decode(ids)
    return ties


def test_same_ids_as_sentencepiece(sentencepiece_file, tmp_path):
    ours = write(sentencepiece_file, tmp_path / "out")
    assert isinstance(ours, PreTrainedTokenizerFast)
    assert len(ours) == tiny.VOCAB
    assert (ours.unk_token_id, ours.bos_token_id, ours.eos_token_id) == (0, 1, 2)
    ties = assert_same(ours, sentencepiece_file)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    proto = sentencepiece_model_pb2.ModelProto.FromString(reference.serialized_model_proto())
    assert ties == 0 if proto.trainer_spec.model_type == 2 else ties < 100
    for text in SAMPLES:
        assert ours.decode(ours.encode(text)) == text.replace("▁", " ")
    assert (tmp_path / "out/tokenizer.model").read_bytes() == sentencepiece_file.read_bytes()
    check_same_ids(sentencepiece_file, tmp_path / "out")


def test_control_pieces_in_text_are_the_known_difference(sentencepiece_file, tmp_path):
    ours = write(sentencepiece_file, tmp_path / "out")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    text = "a</s>b <unk> <s>"
    assert 2 in ours.encode(text)
    assert 2 not in reference.encode(text)
    plain = AutoTokenizer.from_pretrained(tmp_path / "out", split_special_tokens=True)
    assert plain.encode(text) == reference.encode(text)
    assert ours.decode([*ours.encode("a"), 2], skip_special_tokens=True) == "a"


@pytest.mark.parametrize(
    "changes",
    [
        {"user_defined_symbols": ["\n", "\t", "<|token|>", "▁▁▁▁", "  "]},
        {"byte_fallback": False},
        {"add_dummy_prefix": True, "user_defined_symbols": []},
        {
            "user_defined_symbols": [],
            "add_dummy_prefix": True,
            "remove_extra_whitespaces": True,
            "normalization_rule_name": "nmt_nfkc",
        },
        {"pad_id": 3},
    ],
    ids=["user-defined", "no byte fallback", "dummy prefix", "sentencepiece's defaults", "pad"],
)
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_other_sentencepiece_options(kind, changes, tmp_path):
    source = tiny.train_sentencepiece(tmp_path, kind, **changes)
    assert_same(write(source, tmp_path / "out"), source)


@pytest.mark.parametrize("cleaning", [True, False])
def test_dummy_prefix_with_user_defined_pieces_is_refused(cleaning, tmp_path):
    source = tiny.train_sentencepiece(
        tmp_path, "bpe", add_dummy_prefix=True, remove_extra_whitespaces=cleaning
    )
    with pytest.raises(UserError, match="cannot be exported"):
        write(source, tmp_path / "out")


def test_disagreement_is_refused(bpe_file, tmp_path, monkeypatch):
    """The check finds a wrong merge order and a wrong decoder."""
    convert = tokenizer_module.sentencepiece_to_tokenizers

    def longest_merges_first(proto):
        for piece in proto.pieces:
            piece.score = len(piece.piece)
        return convert(proto)

    def spaces_not_decoded(proto):
        converted = convert(proto)
        converted.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        return converted

    for broken, message in ((longest_merges_first, "gives"), (spaces_not_decoded, "decodes")):
        monkeypatch.setattr(tokenizer_module, "sentencepiece_to_tokenizers", broken)
        with pytest.raises(UserError, match=message):
            write(bpe_file, tmp_path / message)


def test_hugging_face_tokenizer_is_copied(tmp_path):
    original = Tokenizer(
        models.WordLevel({"[UNK]": 0, "hello": 1, "<|end|>": 2}, unk_token="[UNK]")  # noqa: S106
    )
    original.pre_tokenizer = pre_tokenizers.Whitespace()
    source = tmp_path / "tokenizer.json"
    original.save(str(source))
    ours = write(source, tmp_path / "out", vocab_size=3)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == source.read_bytes()
    assert not (tmp_path / "out/tokenizer.model").exists()
    assert ours.eos_token_id == 2
    assert ours.encode("hello there") == [1, 0]
    assert ours.decode([1, 2], skip_special_tokens=True) == "hello"
    written = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert "<|end|>" in written.values()


def test_errors(bpe_file, tmp_path):
    def fails(message, source, **changes):
        with pytest.raises(UserError, match=message):
            write(source, tmp_path / message.replace(" ", "_"), **changes)

    fails("does not exist", tmp_path / "none.model")
    fails("500 tokens and the model 499", bpe_file, vocab_size=499)
    fails("has no token 777", bpe_file, eos_token_id=777)
    garbage = tmp_path / "garbage.model"
    garbage.write_bytes(b"not a model")
    fails("is not a SentencePiece model", garbage)
    garbage.write_bytes(b"")
    fails("it has no pieces", garbage)
    garbage = tmp_path / "garbage.json"
    garbage.write_text("{}")
    fails("is not a Hugging Face tokenizer", garbage)
    fails("neither bpe nor unigram", tiny.train_sentencepiece(tmp_path, "char"))
