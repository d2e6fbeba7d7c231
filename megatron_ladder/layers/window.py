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
"""Rows of a bias begin at multiples of so many numbers: torch's kernel on GPUs would copy other ones."""


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
    s (block + window) scores are computed. Two biases, of the first block and of the others, are enough for
    all lengths and layers; where tokens before the first query are keys too, the first block may have one
    of its own.

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
        before = last - first - (stop - start)
        bias = bias_of_last(size, before, window, query.dtype, query.device)
        parts.append(
            attend(
                query[:, :, start:stop],
                key[:, :, first:last],
                value[:, :, first:last],
                bias[: stop - start, : last - first],
            )
        )
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


@functools.lru_cache(maxsize=8)
def bias_of_last(
    queries: int, before: int, window: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What is added to the scores of tokens, with their own keys and those of `before` tokens before them.

    Its upper left part is that of fewer tokens. It is kept, so that all layers share it: autograd would
    keep one for each of them.

    Returns:
        [queries, before + queries] of `dtype`: 0 within the window, else -inf.
    """
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
