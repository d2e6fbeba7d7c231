"""Text from tokens that come one by one."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pretrain.inference.text import TextStream

TEXT = "Grüße, 日本語 und 🙂🙃! ENDE of it\n\nUser: more"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte is a token, or several: characters come in pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["User: it of it END"] * 3, trainer)
    return tokenizer


def pieces(ids: list[int], draw: random.Random) -> list[list[int]]:
    cut = []
    while ids:
        size = draw.randrange(4)
        cut.append(ids[:size])
        ids = ids[size:]
    return cut


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_whole_characters_and_make_the_text(tokenizer: Tokenizer, seed: int) -> None:
    draw = random.Random(seed)
    ids = tokenizer.encode(TEXT).ids
    begin = draw.randrange(len(ids))
    stream = TextStream(tokenizer, ids[:begin])
    given = [stream.push(piece) for piece in pieces(ids[begin:], draw)]
    assert all("\ufffd" not in text for text in given)
    given.append(stream.push([], is_last=True))
    whole, before = TEXT, tokenizer.decode(ids[max(0, begin - 8) : begin])
    if "\ufffd" not in before:
        assert "".join(given) == whole[len(tokenizer.decode(ids[:begin])) :]
    else:
        assert whole.endswith("".join(given)[1:])


@pytest.mark.parametrize("seed", range(20))
def test_nothing_of_a_stop_sequence_is_given(tokenizer: Tokenizer, seed: int) -> None:
    draw = random.Random(seed)
    stream = TextStream(tokenizer, [], ["\n\nUser:", "nowhere", "it\n"])
    given = ""
    for piece in pieces(tokenizer.encode(TEXT).ids, draw):
        given += stream.push(piece)
        assert TEXT.startswith(given)
        assert "it\n" not in given and not given.endswith(" it")
    assert stream.stopped
    assert given == TEXT[: TEXT.index("it\n")]
    assert stream.push(tokenizer.encode("more").ids, is_last=True) == ""


@pytest.mark.parametrize("seed", range(5))
def test_a_long_text_is_decoded_a_few_tokens_at_a_time(tokenizer: Tokenizer, seed: int) -> None:
    draw = random.Random(seed)
    whole = "".join(
        draw.choice(["🙂", "日本", " of it", "ü", "\n\nUser", "EN"]) for _ in range(300)
    )

    class Watched:
        longest = 0

        def decode(self, ids: list[int], **how: bool) -> str:
            self.longest = max(self.longest, len(ids))
            return tokenizer.decode(ids, **how)

    watched = Watched()
    stream = TextStream(watched, tokenizer.encode("User").ids, ["\n\nUser:", "END"])  # type: ignore[arg-type]
    given = [stream.push([id]) for id in tokenizer.encode(whole).ids]
    if not stream.stopped:
        given.append(stream.push([], is_last=True))
    end = min(whole.find(stop) % (len(whole) + 1) for stop in ("\n\nUser:", "END"))
    assert "".join(given) == whole[:end]
    assert watched.longest < 32


def test_bytes_of_sentencepiece_in_a_long_text() -> None:
    """A run of byte tokens is decoded as a whole: it must not be cut within a character."""
    vocabulary = [("<unk>", 0.0), *((f"<0x{byte:02X}>", 0.0) for byte in range(256)), ("▁a", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    text = "🙂é日" * 30 + " a a" + "🙃" * 30
    ids = [257 if word == " a" else byte + 1 for word, byte in _bytes_of(text)]
    stream = TextStream(tokenizer, [])
    given = [stream.push([id]) for id in ids]
    assert "".join(given) + stream.push([], is_last=True) == text


def _bytes_of(text: str) -> list[tuple[str, int]]:
    """The bytes of a text, in which " a" is one token."""
    parts = text.replace(" a", "\0").encode()
    return [(" a" if byte == 0 else "", byte) for byte in parts]


def test_what_might_have_been_a_stop_sequence_is_given_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [], ["ENDE"])
    ids = tokenizer.encode("the END").ids
    assert "END" not in stream.push(ids)
    assert not stream.stopped
    assert stream.push([], is_last=True).endswith("END")


def test_bytes_that_never_become_a_character_are_given_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [])
    ids = tokenizer.encode("a🙂").ids
    assert stream.push(ids[:-1]) == "a"
    assert stream.push([], is_last=True) == "\ufffd"
