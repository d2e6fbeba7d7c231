"""The files of one part: its tokens, the lengths of its documents, and which tokens are trained on."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_prep.encode.split import SPLITS, Fractions, sizes_and_splits
from data_prep.errors import UserError
from data_prep.files import sync_folder, temporary_name

MOST_TOKENS = 2**31 - 1
"""Of a document: its length is stored in 32 bits."""


@dataclass
class _SplitFiles:
    """The files of one split, by ending, and what is written to them."""

    files: dict[str, BinaryIO]
    digest: Any = field(default_factory=hashlib.sha256)
    mask_digest: Any = field(default_factory=hashlib.sha256)
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    trained: int = 0


class PartFiles:
    """A part's tokens and document lengths, by split: STEM.train.bin, STEM.train.len. Conversations have
    STEM.train.mask too: for each token, whether it is trained on."""

    def __init__(
        self,
        stem: str,
        dtype: str,
        eod_id: int,
        fractions: Fractions,
        bos_id: int | None = None,
        min_tokens: int = 1,
    ) -> None:
        self._stem, self._eod_id, self._fractions = stem, eod_id, fractions
        self._bos_id, self._min_tokens = bos_id, min_tokens
        self.empty = 0
        self.too_short = {"documents": 0, "tokens": 0}
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._open: dict[str, _SplitFiles] = {}

    def __enter__(self) -> "PartFiles":
        return self

    def __exit__(self, *_: object) -> None:
        for files in self._open.values():  # empty after `close`; else there was an error
            for file in files.files.values():
                file.close()
                Path(file.name).unlink(missing_ok=True)

    def add(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray) -> tuple[int, int]:
        """Appends documents, each with EOD, and with BOS where it is asked for. Those that are empty, or
        have fewer than `min_tokens` tokens with EOD and BOS, are left out and counted. A document that
        begins with BOS, as a chat template may write it, gets no second one.

        Returns:
            Documents and tokens written.
        """
        return self._add(texts, ids, lengths, None, None)

    def add_conversations(
        self,
        texts: list[str],
        ids: np.ndarray,
        trained: np.ndarray,
        lengths: np.ndarray,
        end_trained: np.ndarray,
    ) -> tuple[int, int]:
        """The same, with a mask of the tokens that are trained on."""
        return self._add(texts, ids, lengths, trained, end_trained)

    def _add(
        self,
        texts: list[str],
        ids: np.ndarray,
        lengths: np.ndarray,
        trained: np.ndarray | None,
        end_trained: np.ndarray | None,
    ) -> tuple[int, int]:
        filled = lengths > 0
        begins = np.zeros(len(lengths), np.int64)  # 1: a BOS is added
        if self._bos_id is not None:
            begins[filled] = ids[(lengths.cumsum() - lengths)[filled]] != self._bos_id
        counts = lengths + 1 + begins
        kept = filled & (counts >= self._min_tokens)
        short = filled & ~kept
        self.empty += int((~filled).sum())
        if short.any():
            self.too_short["documents"] += int(short.sum())
            self.too_short["tokens"] += int(counts[short].sum())
            of_kept = np.repeat(kept, lengths)
            ids, trained = ids[of_kept], trained[of_kept] if trained is not None else None
        lengths, begins, counts = lengths[kept], begins[kept], counts[kept]
        ends = lengths.cumsum()
        # A document's tokens move on by one place for each EOD before them, and for each BOS.
        tokens = np.full(counts.sum(), self._eod_id, self._dtype)
        eods = ends + np.arange(len(ends)) + begins.cumsum()
        firsts = (eods - lengths - begins)[begins.astype(bool)]
        text = np.ones(len(tokens), bool)
        text[eods] = text[firsts] = False
        tokens[text] = ids
        tokens[firsts] = self._bos_id or 0
        mask = None
        if trained is not None and end_trained is not None:
            mask = np.zeros(len(tokens), np.uint8)
            mask[text], mask[eods] = trained, end_trained[kept]
        if len(counts) and counts.max() > MOST_TOKENS:
            raise UserError(
                f"a document has {counts.max():,} tokens, a data set holds at most {MOST_TOKENS:,} of each "
                "(lower --max-document-bytes to leave such documents out)"
            )
        counts = counts.astype("<i4")
        sizes, numbers = sizes_and_splits(
            (t for t, keep in zip(texts, kept, strict=True) if keep), self._fractions
        )
        for number in np.unique(numbers):
            chosen = numbers == number
            size = int(sizes[chosen].sum())
            if chosen.all():
                self._write(SPLITS[number], tokens, mask, counts, size)
            else:
                these = np.repeat(chosen, counts)
                some = mask[these] if mask is not None else None
                self._write(SPLITS[number], tokens[these], some, counts[chosen], size)
        return len(counts), len(tokens)

    def _write(
        self,
        split: str,
        tokens: np.ndarray,
        mask: np.ndarray | None,
        counts: np.ndarray,
        size: int,
    ) -> None:
        if split not in self._open:
            endings = ("bin", "len") if mask is None else ("bin", "len", "mask")
            self._open[split] = _SplitFiles(
                {e: self._temporary(split, e).open("wb") for e in endings}
            )
        files = self._open[split]
        raw = tokens.view(np.uint8).data
        files.files["bin"].write(raw)
        files.digest.update(raw)
        files.files["len"].write(counts.tobytes())
        if mask is not None:
            files.files["mask"].write(mask.data)
            files.mask_digest.update(mask.data)
            files.trained += int(mask.sum())
        files.documents += len(counts)
        files.tokens += len(tokens)
        files.text_bytes += size

    def _temporary(self, split: str, ending: str) -> Path:
        return temporary_name(Path(f"{self._stem}.{split}.{ending}"))

    def close(self) -> dict[str, dict[str, Any]]:
        """Makes the files durable, under their names; returns figures by split."""
        splits: dict[str, dict[str, Any]] = {}
        for split in sorted(self._open):
            files = self._open[split]
            for ending, file in files.files.items():
                file.flush()
                os.fsync(file.fileno())
                file.close()
                self._temporary(split, ending).replace(f"{self._stem}.{split}.{ending}")
            splits[split] = {
                "documents": files.documents,
                "tokens": files.tokens,
                "text_bytes": files.text_bytes,
                "bin_bytes": files.tokens * self._dtype.itemsize,
                "sha256": files.digest.hexdigest(),
            }
            if "mask" in files.files:
                splits[split] |= {
                    "mask_bytes": files.tokens,
                    "mask_sha256": files.mask_digest.hexdigest(),
                    "trained_tokens": files.trained,
                }
        self._open = {}
        sync_folder(Path(self._stem).parent)
        return splits
