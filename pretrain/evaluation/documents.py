"""The documents of a data set's split: their tokens, which tokens are trained on, and their text."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import Tokenizer

from megatron_ladder.errors import UserError
from megatron_ladder.hf.tokenizer import sentencepiece_to_tokenizers
from pretrain.data.folders import DataFolder
from pretrain.files import sha256


@dataclass(frozen=True)
class Documents:
    """All documents of a split, or some of them. Tokens are read from disk only when they are asked for."""

    folder: DataFolder
    split: str
    numbers: np.ndarray
    """The numbers of these documents in the split, ascending."""
    ends: np.ndarray
    """int64 [documents of the split + 1]: where each document begins in .bin, in tokens; then the end of
    the last one."""

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def is_whole(self) -> bool:
        return len(self.numbers) == len(self.ends) - 1

    @property
    def tokens(self) -> int:
        """The number of tokens of these documents, including each one's EOD."""
        return int(np.diff(self.ends)[self.numbers].sum())

    def at_most(self, tokens: int, seed: int) -> "Documents":
        """Whole documents, drawn at random, with at most `tokens` tokens together; in the split's order.

        Raises:
            UserError: the first document that is drawn has more tokens.
        """
        if self.tokens <= tokens:
            return self
        order = np.random.default_rng(seed).permutation(self.numbers)
        count = int((np.cumsum(np.diff(self.ends)[order]) <= tokens).sum())
        if count == 0:
            length = int(np.diff(self.ends)[order[0]])
            raise UserError(
                f"{self.folder.path}: only whole documents are measured, and the first one that was drawn "
                f"has {length:,} tokens, more than --max-tokens {tokens:,}: give at least as many"
            )
        return Documents(self.folder, self.split, np.sort(order[:count]), self.ends)

    def ids(self) -> np.ndarray:
        """The token ids of these documents, one document after another, each with its EOD: [tokens]."""
        data = np.memmap(
            self.folder.prefix(self.split) + ".bin", self.folder.manifest["dtype"], "r"
        )
        return self._of_each(data)

    def trained(self) -> np.ndarray | None:
        """For each token of `ids` whether it is trained on: bool [tokens]. None: all are."""
        path = Path(self.folder.prefix(self.split) + ".mask")
        if not path.is_file():
            return None
        return self._of_each(np.memmap(path, np.uint8, "r")).astype(bool)

    def _of_each(self, data: np.ndarray) -> np.ndarray:
        if self.is_whole:
            return data
        return np.concatenate([data[self.ends[n] : self.ends[n + 1]] for n in self.numbers])

    def text_bytes(self) -> int:
        """UTF-8 bytes of these documents' text; for a whole split, the count that its manifest holds."""
        if self.is_whole:
            return self.folder.manifest["splits"][self.split]["text_bytes"]
        texts = Texts(self)
        return sum(len(texts[i].encode()) for i in range(len(texts)))


class Texts(Sequence[str]):
    """The documents' texts, decoded by the tokenizer that the data set was made with."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        facts = documents.folder.tokenizer
        file = documents.folder.path / facts["file"]
        if not file.is_file() or sha256(file) != facts["sha256"]:
            raise UserError(
                f"{file} is not the tokenizer the data set was made with: copy that file back, or make "
                "the data set again"
            )
        self._tokenizer = load_tokenizer(file)
        name = documents.folder.prefix(documents.split) + ".bin"
        self._data = np.memmap(name, documents.folder.manifest["dtype"], "r")
        self._decoded = functools.lru_cache(maxsize=32)(self._decode)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, number):  # type: ignore[no-untyped-def] # no slices
        return self._decoded(int(number))

    def _decode(self, number: int) -> str:
        document = self._documents.numbers[number]
        first, end = self._documents.ends[document : document + 2]
        return self._tokenizer.decode(self._data[first : end - 1].tolist(), False)  # without EOD


def open_split(folder: DataFolder, split: str) -> Documents:
    """All documents of a split.

    Raises:
        UserError: there is no such split, or it is empty.
    """
    if not folder.tokens(split):
        there = [name for name in folder.manifest["splits"] if folder.tokens(name)]
        raise UserError(
            f"{folder.path} has nothing in its {split} split: give --split "
            f"{' or '.join(there) or 'of another data set'}"
        )
    # The lengths are copied here: IndexedDataset unmaps its arrays when it is deleted.
    index = IndexedDataset(folder.prefix(split))
    ends = np.concatenate([[0], np.cumsum(index.sequence_lengths, dtype=np.int64)])
    return Documents(folder, split, np.arange(len(ends) - 1), ends)


def load_tokenizer(file: Path) -> Tokenizer:
    """Loads a tokenizer.json, or a SentencePiece .model, as a `Tokenizer`.

    Raises:
        UserError: the file is neither.
    """
    try:
        if file.suffix == ".json":
            tokenizer = Tokenizer.from_file(str(file))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            return tokenizer
        proto = ModelProto.FromString(file.read_bytes())
    except Exception as error:  # tokenizers and protobuf raise nothing narrower
        raise UserError(
            f"{file} cannot be read as a tokenizer.json or a SentencePiece model: {error}"
        ) from error
    tokenizer = sentencepiece_to_tokenizers(proto)
    # As in SentencePiece, the characters "</s>" in a text are text, not the special token.
    tokenizer.encode_special_tokens = True
    return tokenizer
