"""Loss against position: how much a model makes of the tokens before a token, as they become more."""

import math
from typing import Any

import numpy as np

FIRST_BUCKET = 8
"""Tokens of the first bucket at least."""


def bucket_ends(seq_length: int) -> np.ndarray:
    """The last position of each bucket; each is about 1.41 times the one before it: int64 [buckets].

    A token's position is the number of tokens before it in its window, from 1 to `seq_length`.
    """
    halves = range(int(2 * math.log2(max(seq_length / FIRST_BUCKET, 1))) + 1)
    return np.unique([round(seq_length / 2 ** (half / 2)) for half in halves])


def bucket_sums(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The sum over each bucket: fp64 [buckets]; of a short window some buckets have none.

    Args:
        values: [n], of the positions 1 to n.
        ends: as `bucket_ends` gives them.
    """
    up_to = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return np.diff(up_to[np.minimum(ends, len(values))], prepend=0.0)


def by_position(sums: np.ndarray, counts: np.ndarray, ends: np.ndarray) -> list[dict[str, Any]]:
    """The mean loss of each bucket, with its standard error over windows.

    Args:
        sums: [windows, buckets], nats.
        counts: [windows, buckets], tokens.
        ends: [buckets].
    """
    found = []
    for bucket, last in enumerate(ends.tolist()):
        here = counts[:, bucket] > 0
        if here.any():
            nats, tokens = sums[here, bucket], counts[here, bucket]
            found.append(
                {
                    "first": int(ends[bucket - 1]) + 1 if bucket else 1,
                    "last": last,
                    "loss": float(nats.sum() / tokens.sum()),
                    "loss_stderr": ratio_stderr(nats, tokens),
                    "tokens": int(tokens.sum()),
                }
            )
    return found


def ratio_stderr(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """The standard error of sum(sums) / sum(counts), where the pairs are drawn independently.

    Args:
        sums: [n], such as the summed loss of each window.
        counts: [n], such as the number of tokens of each window.

    Returns:
        None for a single pair, which does not show how pairs vary.
    """
    number = len(sums)
    if number < 2:
        return None
    rest = sums - counts * (sums.sum() / counts.sum())
    return float(math.sqrt((rest**2).sum() * number / (number - 1)) / counts.sum())
