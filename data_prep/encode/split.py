"""Which split a document is in: its content decides, so it stays there when other documents change."""

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SPLITS = ("train", "validation", "test")
DEFAULT_VALIDATION = 0.01


@dataclass(frozen=True)
class Fractions:
    """Shares of documents that are held out."""

    validation: float
    test: float


def hash_fraction(text: str) -> float:
    """A number from 0 to 1 that depends on the text alone."""
    return _fraction(text.encode())


def _fraction(raw: bytes) -> float:
    digest = hashlib.blake2b(raw, digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def sizes_and_splits(texts: Iterable[str], fractions: Fractions) -> tuple[np.ndarray, np.ndarray]:
    """For each document, its bytes in UTF-8 and the index of its split in SPLITS."""
    sizes, values = array("q"), array("d")
    split = bool(fractions.validation or fractions.test)
    for text in texts:
        raw = text.encode()
        sizes.append(len(raw))
        values.append(_fraction(raw) if split else 1.0)
    value = np.frombuffer(values, np.float64)
    validation, held_out = fractions.validation, fractions.validation + fractions.test
    numbers = np.where(value < validation, 1, np.where(value < held_out, 2, 0))
    return np.frombuffer(sizes, np.int64), numbers
