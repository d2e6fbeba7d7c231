"""What turns texts into ids: the reference tokenizers, and a fast one that must give the same."""

import itertools
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np

from data_prep.encoders import Encoder, HuggingFaceEncoder, SentencePieceEncoder
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


class FastEngine:
    """gigatoken; texts that hold one of `routed` go to the reference engine.

    Chosen by measurement (docs/data.md): of the engines that gave the reference's ids it is the
    fastest, on both kinds of tokenizer. guard.py checks that it does, before any work.

    Raises:
        UserError: gigatoken does not know this kind of tokenizer, with its reason.
    """

    def __init__(self, tokenizer: Path, routed: Sequence[str], reference: "LazyReference") -> None:
        import gigatoken

        try:
            self._backend = gigatoken.Tokenizer(str(tokenizer)).backend
        except Exception as error:  # it raises nothing narrower
            raise UserError(f"gigatoken: {error}") from error
        self._reference = reference
        self._routed = re.compile("|".join(map(re.escape, routed))) if routed else None
        self.name = f"gigatoken {version('gigatoken')}"

    def encode(self, texts: Sequence[str]) -> Ids:
        if self._routed is None:
            return self._fast(texts)
        search = self._routed.search
        marked = [i for i, text in enumerate(texts) if search(text)]
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
        # On this thread: there is a process for every core already.
        layout = self._backend.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)


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
