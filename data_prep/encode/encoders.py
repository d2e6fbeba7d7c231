"""Tokenizers read from their files: SentencePiece models and Hugging Face's tokenizer.json."""

import hashlib
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from data_prep.errors import UserError

EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")


class Encoder(Protocol):
    """Text to ids and back, without special tokens."""

    kind: str
    vocab_size: int
    eod_id: int

    def encode(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, ids: list[int]) -> str: ...

    def piece(self, token_id: int) -> str: ...

    def marks(self) -> list[tuple[str, ...]]:
        """Strings that become one token whatever text is around them, in groups of the same kind."""
        ...


class SentencePieceEncoder:
    """A SentencePiece model. It reads text that spells a control piece as ordinary text."""

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise UserError(f"tokenizer {path} is not a SentencePiece model") from error
        self.vocab_size: int = self._model.vocab_size()
        self.eod_id: int = self._model.eos_id()
        if self.eod_id < 0:
            raise UserError(
                f"tokenizer {path} has no end-of-sentence piece to end documents with: train it "
                "with one (eos_id)"
            )

    def encode(self, texts: list[str]) -> list[list[int]]:
        # One thread, as there is a process for every core.
        return self._model.EncodeAsIds(texts, num_threads=1)

    def normalize(self, text: str) -> str:
        return self._model.Normalize(text)

    def decode(self, ids: list[int]) -> str:
        return self._model.DecodeIds(ids)

    def piece(self, token_id: int) -> str:
        return self._model.IdToPiece(token_id)

    def marks(self) -> list[tuple[str, ...]]:
        model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        model.ParseFromString(self._model.serialized_model_proto())
        kinds = ((2, 3), (4,))  # unknown and control pieces; user-defined ones
        groups = [tuple(p.piece for p in model.pieces if p.type in kind) for kind in kinds]
        return [group for group in groups if group]


class HuggingFaceEncoder:
    """A tokenizer.json. No special token is added, but text that spells one becomes that token."""

    kind = "huggingface"

    def __init__(self, path: Path, eod_token: str | None) -> None:
        try:
            self._model = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"tokenizer {path} is not a Hugging Face tokenizer.json") from error
        self._model.no_padding()
        self._model.no_truncation()
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        candidates = (eod_token,) if eod_token else EOD_TOKENS
        ids = [self._model.token_to_id(token) for token in candidates]
        eod_id = next((i for i in ids if i is not None), None)
        if eod_id is None:
            raise UserError(
                f"tokenizer {path} has no token {' or '.join(candidates)} to end documents with: "
                "give --eod-token TOKEN"
            )
        self.eod_id: int = eod_id

    def encode(self, texts: list[str]) -> list[list[int]]:
        encoded = self._model.encode_batch_fast(texts, add_special_tokens=False)
        return [e.ids for e in encoded]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)

    def piece(self, token_id: int) -> str:
        return self._model.id_to_token(token_id) or ""

    def marks(self) -> list[tuple[str, ...]]:
        added = tuple(t.content for t in self._model.get_added_tokens_decoder().values())
        return [added] if added else []


def open_encoder(path: Path, eod_token: str | None = None) -> Encoder:
    """The tokenizer in a file, by its ending: .model or .json.

    Raises:
        UserError: no such file, not a tokenizer, or no token to end documents with.
    """
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist")
    if path.suffix == ".model":
        if eod_token:
            raise UserError(
                "--eod-token is for tokenizer.json: a SentencePiece model names its own"
            )
        return SentencePieceEncoder(path)
    if path.suffix == ".json":
        return HuggingFaceEncoder(path, eod_token)
    raise UserError(
        f"tokenizer {path}: give a SentencePiece .model or a Hugging Face tokenizer.json"
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
