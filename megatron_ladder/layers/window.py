"""Attention of tokens to a window: themselves and those just before them (Mistral, arXiv 2310.06825)."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

LEAST_BLOCK = 128
"""Fewest queries that are computed at a time. Small blocks would be many calls."""


def attend_in_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    window: int,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Causal attention of each token to the last `window` tokens, block by block.

    A block of queries sees the keys of its own tokens and of the window before them. So no more than
    s (block + window) scores are computed, and one mask of a block is enough for all blocks and layers.

    Args:
        query: [b, heads, s, channels], the last s tokens.
        key, value: [b, key/value heads, keys, channels], of all tokens.
        mask: [b or 1, 1, s, keys], bool (True: take part) or a bias of the query's dtype. It is applied
            beside the window. None: there is none.
        window: tokens that a token attends to, itself included.
        attend: attention of queries, keys and values with a mask, such as torch's.

    Returns:
        [b, heads, s, channels]
    """
    length, keys = query.shape[2], key.shape[2]
    size = max(window, LEAST_BLOCK)
    parts = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        first, last = max(0, keys - length + start - window + 1), keys - length + stop
        seen = window_bias(stop - start, last - first, window, query.dtype, query.device)
        if mask is not None:
            part = mask[:, :, start:stop, first:last]
            seen = seen.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else seen + part
        parts.append(
            attend(query[:, :, start:stop], key[:, :, first:last], value[:, :, first:last], seen)
        )
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


@functools.lru_cache(maxsize=8)
def window_bias(
    queries: int, keys: int, window: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What is added to the scores of the last `queries` of `keys` tokens.

    It is kept, so that all layers share it: autograd would keep one for each of them.

    Returns:
        [queries, keys] of `dtype`: 0 within the window, else -inf.
    """
    with torch.inference_mode(False):  # training may use it later
        outside = ~in_window(queries, keys, window, device)
        return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(
            outside, -torch.inf
        )


def in_window(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each of the last `queries` of `keys` tokens attends to: bool [queries, keys].

    Args:
        window: None: all tokens up to its own.
    """
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)
