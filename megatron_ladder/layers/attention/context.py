"""Context parallelism: the ranks of a group divide the tokens of each sequence.

A sequence is cut into 2 n chunks for n ranks, and rank i has the chunks i and 2 n - 1 - i ("zigzag"). A
late token attends to more tokens than an early one, so each rank has as many scores to compute.
megatron-core's RoPE and Transformer Engine (TE) cut in the same way.

Core attention alone needs tokens of other ranks. TE's passes keys and values around a ring. Attention here
gathers them (arXiv 2407.21783, section 3.3.2), computes this rank's queries, and scatters their gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_ladder.layers.attention.documents import Documents


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The numbers of a rank's two chunks, of 2 size chunks of each sequence."""
    return rank, 2 * size - 1 - rank


def tokens_of(x: Tensor, rank: int, size: int) -> Tensor:
    """A rank's tokens of whole sequences: [b, s, ...] -> [b, s/size, ...]."""
    if size == 1:
        return x
    chunks = x.chunk(2 * size, dim=1)
    return torch.cat([chunks[number] for number in chunks_of(rank, size)], dim=1)


def gathered(key: Tensor, value: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """The tokens of all ranks, in the order of the sequence: two of [s/n, ...] -> two of [s, ...].

    In backward each rank gets the sum of all ranks' gradients of its tokens.
    """
    by_rank = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), group=group)
    chunks = by_rank.unflatten(0, (group.size(), 2, -1))  # [n, 2, s/2n, 2, ...]
    first, second = chunks.unbind(1)
    key, value = (
        torch.cat([one, other.flip(0)]).flatten(0, 1)
        for one, other in zip(first.unbind(2), second.unbind(2), strict=True)
    )
    return key, value


def attend_over_ranks(
    attend: Callable[[Tensor, Tensor, Tensor, tuple[int, int]], Tensor],
    group: Any,
    documents: Documents | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """Attention of this rank's tokens to those of all ranks.

    Args:
        attend: causal attention of the last queries: [queries, b, heads, channels] and [keys, b, key/value
            heads, channels] -> [queries, b, heads x channels]. It also gets the most queries and the most
            keys before them that a document has in the chunk.
        group: the n ranks among which the sequences are divided.
        documents: of the whole sequences. None: each sequence is one.
        query: [s/n, b, heads, channels].
        key, value: [s/n, b, key/value heads, channels].

    Returns:
        [s/n, b, heads x channels].
    """
    key, value = gathered(key, value, group)
    # Without documents all sequences are alike, and are computed together.
    each = 1 if documents else query.shape[1]
    lengths = documents.lengths if documents else [[len(key)]]
    sequences = zip(lengths, *(x.split(each, dim=1) for x in (query, key, value)), strict=True)
    attended = [_attend(attend, group.rank(), group.size(), *sequence) for sequence in sequences]
    return torch.cat(attended, dim=1)


def _attend(
    attend: Callable[[Tensor, Tensor, Tensor, tuple[int, int]], Tensor],
    rank: int,
    size: int,
    lengths: list[int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """`attend_over_ranks` of sequences with documents of the same lengths."""
    attended = []
    for number, own in zip(chunks_of(rank, size), query.chunk(2), strict=True):
        end = (number + 1) * len(own)
        queries, keys = parts_of_chunk(lengths, end - len(own), end)
        seen = (x[end - sum(keys) : end].split(keys) for x in (key, value))
        most = len(own), end - len(own)
        attended += [
            attend(q, k, v, most) for q, k, v in zip(own.split(queries), *seen, strict=True)
        ]
    return torch.cat(attended)


def parts_of_chunk(lengths: list[int], begin: int, end: int) -> tuple[list[int], list[int]]:
    """The documents of which a chunk has tokens, in their order.

    Args:
        lengths: of all documents of the sequence, in tokens.
        begin, end: the chunk's first token, and the one after its last.

    Returns:
        The tokens of each in the chunk, and those up to the chunk's end: the first document may begin
        before the chunk.
    """
    queries, keys, start = [], [], 0
    for length in lengths:
        stop = min(start + length, end)
        if stop > max(start, begin):
            queries.append(stop - max(start, begin))
            keys.append(stop - start)
        start += length
    return queries, keys
