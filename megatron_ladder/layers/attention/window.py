"""Attention of tokens to a window: themselves and those just before them (Mistral, arXiv 2310.06825)."""

import functools
from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

LEAST_BLOCK = 128
"""Fewest queries that are computed at a time. Small blocks would be many calls."""
ALIGNMENT = 16
"""Rows of a bias begin at multiples of so many numbers: torch's kernel on GPUs copies or refuses others."""


def layer_window(config: TransformerConfig, layer_number: int) -> int | None:
    """The tokens that a token attends to in a layer, itself included. None: all tokens before it.

    Args:
        layer_number: numbered from 1.
    """
    size, skipped = config.window_size, config.window_attn_skip_freq
    return size[0] + 1 if is_layer_window_attention(size, skipped, layer_number) else None


def attend_in_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Causal attention of each token to the last `window` tokens, block by block.

    A block of queries sees the keys of its own tokens and of the window before them. So no more than
    s (block + window) scores are computed. The biases are parts of one, for all lengths and layers.

    Args:
        query: [b, heads, s, channels], of the last s tokens.
        key, value: [b, key/value heads, keys, channels], of all tokens.
        window: tokens that a token attends to, itself included.
        attend: attention of queries, keys and values with a bias, such as torch's.

    Returns:
        [b, heads, s, channels]
    """
    length, keys = query.shape[2], key.shape[2]
    size = max(window, LEAST_BLOCK)
    parts = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        first, last = max(0, keys - length + start - window + 1), keys - length + stop
        most = size, window - 1
        bias = bias_of_last(stop - start, last - first, most, window, query.dtype, query.device)
        parts.append(
            attend(query[:, :, start:stop], key[:, :, first:last], value[:, :, first:last], bias)
        )
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def bias_of_last(
    queries: int,
    keys: int,
    most: tuple[int, int],
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """What is added to the scores of the last `queries` of `keys` tokens.

    Whether a token sees a key depends on the distance between them alone. So every bias is a part of a
    larger one, which is kept: documents have many lengths, and autograd would keep a bias for each of them
    and each layer.

    Args:
        most: the most queries, and the most keys before the first of them, that are asked for.
        window: None: all tokens up to its own.

    Returns:
        [queries, keys] of `dtype`: 0 within the window, else -inf. A view.
    """
    most_queries, most_before = most
    before = keys - queries
    assert queries <= most_queries and before <= most_before
    column = most_before - before
    row = -column % ALIGNMENT  # so many columns further too: the same distances, aligned
    kept = _largest_bias(most_queries + ALIGNMENT - 1, most_before, window, dtype, device)
    return kept[row : row + queries, column + row : column + row + keys]


@functools.lru_cache(maxsize=8)
def _largest_bias(
    queries: int, before: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    keys = before + queries
    with torch.inference_mode(False):  # training may use it later
        rows = torch.zeros(queries, -(-keys // ALIGNMENT) * ALIGNMENT, dtype=dtype, device=device)
        bias = rows[:, :keys]
        return bias.masked_fill_(~in_window(queries, keys, window, device), -torch.inf)


def in_window(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each of the last `queries` of `keys` tokens attends to: bool [queries, keys].

    Args:
        window: None: all tokens up to its own.
    """
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)
