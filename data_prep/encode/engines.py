"""Engines turn texts into ids: the reference tokenizers, and a fast one that must give the same ids."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.encode.encoders import Encoder, HuggingFaceEncoder, SentencePieceEncoder
from data_prep.errors import UserError

Ids = tuple[np.ndarray, np.ndarray]
"""All documents' ids one after another, [tokens] uint32; each one's count, [documents] int64."""


class Engine(Protocol):
    name: str

    def encode(self, texts: Sequence[str]) -> Ids: ...


class ReferenceEngine:
    """The format's own implementation: SentencePiece, or Hugging Face's tokenizers."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        package = "sentencepiece" if encoder.kind == "sentencepiece" else "tokenizers"
        self.name = f"{package} {version(package)}"

    def encode(self, texts: Sequence[str]) -> Ids:
        lists = self._encoder.encode(list(texts))
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        ids = np.fromiter(itertools.chain.from_iterable(lists), np.uint32, int(lengths.sum()))
        return ids, lengths

    def normalize(self, text: str) -> str:
        """The text as it is cut into pieces: SentencePiece's normalization."""
        assert isinstance(self._encoder, SentencePieceEncoder)
        return self._encoder.normalize(text)


@dataclass(frozen=True)
class FastSource:
    """A tokenizer in the form that FastEngine takes. It is made once, and each process loads it quickly."""

    tokenizer: bytes
    """A tokenizer.json."""
    normalize_first: bool = False
    """Texts are to be normalized by the reference: gigatoken's way is another one."""


def load_fast(tokenizer: Path) -> FastSource:
    """Reads a tokenizer's file for gigatoken.

    Raises:
        UserError: gigatoken does not know this kind of tokenizer, with its reason.
    """
    if tokenizer.suffix == ".json":
        return FastSource(tokenizer.read_bytes())
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json
    from sentencepiece import sentencepiece_model_pb2

    raw = tokenizer.read_bytes()
    try:
        source = sentencepiece_to_tokenizer_json(raw)
    except ValueError as error:
        raise UserError(f"gigatoken: {error}") from error
    model = sentencepiece_model_pb2.ModelProto.FromString(raw)  # type: ignore[attr-defined]
    normalizer = model.normalizer_spec
    if not (normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces):
        return FastSource(source.encode())  # it replaces spaces by U+2581 and does nothing else
    # SentencePiece replaces the longest sequence that its table has. gigatoken looks whole graphemes up,
    # and strips all of Unicode's white space where SentencePiece strips spaces.
    return FastSource(json.dumps({**json.loads(source), "normalizer": None}).encode(), True)


class FastEngine:
    """gigatoken; texts that hold one of `routed` or of `characters` go to the reference engine.

    It was chosen by measurement (docs/guides/data.md): of the engines that gave the reference's ids it was
    the fastest, for both kinds of tokenizer. guard.py checks before any work that it gives those ids.

    Raises:
        UserError: gigatoken does not know this kind of tokenizer, with its reason.
    """

    # Documents are encoded one by one. Batches are not faster, and their results are awkward arrays, whose
    # import takes 40 MB. gigatoken's SentencePiece tokenizer keeps half a byte for each character that it
    # has seen, so it is loaded anew after this many. Its byte-level BPE bounds its memory itself.
    REMEMBERED_CHARACTERS = 25_000_000

    def __init__(
        self,
        source: FastSource,
        routed: Sequence[str],
        reference: "LazyReference",
        characters: str = "",
    ) -> None:
        from gigatoken.gigatoken_rs import _SubstringMatcher

        self._source = source
        self._load()
        self._reference = reference
        self._routed = re.compile("|".join(map(re.escape, routed))) if routed else None
        # Aho-Corasick: at 500 MB/s it takes thousands of characters. A class of `re` tries range by range.
        self._characters = _SubstringMatcher(list(characters)) if characters else None
        self.name = f"gigatoken {version('gigatoken')}"

    def _load(self) -> None:
        from gigatoken.gigatoken_rs import SentencePieceTokenizer, load_hf_json

        self._backend: Any = None  # frees the memory of the old one before the new one is loaded
        try:
            self._backend = load_hf_json(self._source.tokenizer)
        except Exception as error:  # it raises nothing narrower
            raise UserError(f"gigatoken: {error}") from error
        self._remembers = isinstance(self._backend, SentencePieceTokenizer)
        self._seen = 0

    def takes(self, text: str) -> bool:
        """Whether a text does not go to the reference."""
        if self._routed is not None and self._routed.search(text):
            return False
        characters = self._characters
        return characters is None or text.isascii() or not characters.present(text)

    def encode(self, texts: Sequence[str]) -> Ids:
        marked = [i for i, text in enumerate(texts) if not self.takes(text)]
        if not marked:
            return self._fast(texts)
        chosen = set(marked)
        plain = [i for i in range(len(texts)) if i not in chosen]
        pieces: dict[int, np.ndarray] = {}
        for where, (ids, lengths) in (
            (plain, self._fast([texts[i] for i in plain])),
            (marked, self._reference.engine().encode([texts[i] for i in marked])),
        ):
            ends = np.cumsum(lengths)
            for i, end, length in zip(where, ends, lengths, strict=True):
                pieces[i] = ids[end - length : end]
        in_order = [pieces[i] for i in range(len(texts))]
        return np.concatenate(in_order), np.array([len(p) for p in in_order], np.int64)

    def _fast(self, texts: Sequence[str]) -> Ids:
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        encode = self._backend.encode
        if self._source.normalize_first:
            normalize = self._reference.engine().normalize
            texts = [normalize(text) for text in texts]
        ids = [encode(text) for text in texts]
        if self._remembers:
            self._seen += sum(map(len, texts))
            if self._seen > self.REMEMBERED_CHARACTERS:
                self._load()
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return ids[0] if len(ids) == 1 else np.concatenate(ids), lengths


class LazyReference:
    """The reference engine, loaded when the first document needs it."""

    def __init__(self, tokenizer: Path, eod_token: str | None) -> None:
        self._tokenizer, self._eod_token = tokenizer, eod_token
        self._engine: ReferenceEngine | None = None

    def engine(self) -> ReferenceEngine:
        if self._engine is None:
            encoder: Encoder = (
                SentencePieceEncoder(self._tokenizer)
                if self._tokenizer.suffix == ".model"
                else HuggingFaceEncoder(self._tokenizer, self._eod_token)
            )
            self._engine = ReferenceEngine(encoder)
        return self._engine
