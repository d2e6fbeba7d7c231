"""Finds exact duplicates by digests and near duplicates by MinHash; the first of several stays."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data_prep.errors import UserError

PERMUTATIONS = 128
SHINGLE_WORDS = 5
SEED = 1
# At most this many shingles of one document are held as text at once; rensa hashes them.
SHINGLES_AT_ONCE = 200_000


def digest(text: str) -> bytes:
    """16 bytes. The chance that any two of 10^10 texts have the same digest is 10^-19."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def first_of_same(digests: np.ndarray) -> np.ndarray:
    """For each document, the index of the first one with the same digest; it may be its own.

    Args:
        digests: uint64 [documents, 2].

    Returns:
        int64 [documents].
    """
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in order
    if not len(order):
        return order
    ordered = digests[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    first = np.empty_like(order)
    first[order] = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    return first


def shingles(text: str) -> Iterator[list[str]]:
    """Runs of five words, in lists of at most SHINGLES_AT_ONCE; of a shorter text, all its words. In text
    with hardly any spaces, runs of five characters."""
    words: Sequence[str] = text.split()
    if len(text) > 40 * len(words):
        words = text
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    for start in range(0, count, SHINGLES_AT_ONCE):
        stop = min(count, start + SHINGLES_AT_ONCE)
        yield [" ".join(words[i : i + SHINGLE_WORDS]) for i in range(start, stop)]


def signature(text: str) -> list[int]:
    """MinHash (Broder 1997) of the text's shingles: 128 numbers of 32 bits. The share of positions at which
    two signatures agree estimates the texts' Jaccard similarity, with a standard error of at most 0.044.

    By rensa, in Rust: 850 MB of text a second, where datasketch does 10 (measured).
    """
    from rensa import RMinHash

    minhash = RMinHash(num_perm=PERMUTATIONS, seed=SEED)
    for some in shingles(text):
        minhash.update(some)
    return minhash.digest()


def check_rensa() -> None:
    try:
        import rensa  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--near-dedup needs rensa ({error}): pip install 'megatron-ladder[clean]'"
        ) from error


def rows_per_band(threshold: float) -> int:
    """The largest number of rows in a band with which 98 % of the pairs just at the threshold agree on all
    rows of at least one band."""
    return max(
        rows
        for rows in range(1, 33)
        if rows == 1 or 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= 0.98
    )


def band_keys(signatures: np.ndarray, rows: int) -> np.ndarray:
    """A key for each band of each document: documents with an equal key may be near duplicates.

    Args:
        signatures: uint32 [documents, 128].

    Returns:
        uint64 [bands, documents].
    """
    bands = PERMUTATIONS // rows
    keys = np.zeros((bands, len(signatures)), np.uint64)
    for band in range(bands):
        for row in range(band * rows, (band + 1) * rows):
            # Multiply and mix, as in FNV: wraps around at 64 bits.
            keys[band] = (keys[band] ^ signatures[:, row]) * np.uint64(0x9E3779B97F4A7C15)
            keys[band] ^= keys[band] >> np.uint64(29)
    return keys


class Clusters:
    """Clusters of documents (union-find); the first document of a cluster stands for it."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count)

    def find(self, place: int) -> int:
        parent = self._parent
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = int(parent[place])
        return place

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.find(one), self.find(other)))
        self._parent[high] = low

    def apart(self, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Which pairs are perhaps not joined yet: their own entries differ. It is quick, not exact."""
        return self._parent[ones] != self._parent[others]

    def firsts(self) -> np.ndarray:
        """The first of each document's cluster, int64 [documents]."""
        parent = self._parent
        while not (parent[parent] == parent).all():
            parent[:] = parent[parent]
        return parent


def near_duplicates(
    bands: Iterable[np.ndarray], signatures: np.ndarray, places: np.ndarray, threshold: float
) -> np.ndarray:
    """Clusters of documents. Each document is similar to another one of its cluster, as their signatures
    estimate it.

    In each band, documents with the same key are compared with the first of them.

    Args:
        bands: uint64 [documents] each; read one after another.
        signatures: uint32 [rows, 128]; it may be a memory-mapped file.
        places: int64 [documents]: the row of each document in `signatures`.

    Returns:
        int64 [documents]: the first of each one's cluster.
    """
    clusters = Clusters(len(places))
    for keys in bands:
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        new = np.ones(len(order), bool)
        new[1:] = ordered[1:] != ordered[:-1]
        heads = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
        others, heads = order[~new], heads[~new]
        for start in range(0, len(others), 1 << 16):
            a, b = others[start : start + (1 << 16)], heads[start : start + (1 << 16)]
            apart = clusters.apart(a, b)
            a, b = a[apart], b[apart]
            alike = (signatures[places[a]] == signatures[places[b]]).mean(1) >= threshold
            for one, other in zip(a[alike].tolist(), b[alike].tolist(), strict=True):
                clusters.join(one, other)
    return clusters.firsts()
