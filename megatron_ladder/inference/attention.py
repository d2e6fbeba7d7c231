"""Attention over the blocks of megatron-core's key-value cache, in plain PyTorch.

megatron-core calls flash-attn for it, which needs a GPU. This code is used on machines without one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_ladder.layers.attention.window import in_window, layer_window


class LocalSelfAttention(SelfAttention):
    """megatron-core's self-attention, which also runs on a CPU, where there is no flash-attn."""

    def flash_decode_and_prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        seqlens_k: Tensor,
        block_table: Tensor,
        is_decode_only: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attention of the new tokens of all requests. The arguments are megatron-core's.

        Args:
            q: [tokens, 1, heads, channels], the requests one after another.
            k, v: the cache, as in `decode`.
            max_seqlen_q: used on a GPU only.
            max_seqlen_k: used on a GPU only.
            cu_seqlens_q: `starts` of `prefill`.
            cu_seqlens_k: used on a GPU only.
            seqlens_k: `lengths` of `decode` and `prefill`.
            block_table: `blocks` of `decode` and `prefill`.
            is_decode_only: every request has one new token.

        Returns:
            [tokens, 1, heads, channels].
        """
        if q.is_cuda:
            return super().flash_decode_and_prefill(
                *(q, k, v, max_seqlen_q, max_seqlen_k, cu_seqlens_q, cu_seqlens_k, seqlens_k),
                *(block_table, is_decode_only, *args),
                **kwargs,
            )
        how = {
            "window": layer_window(self.config, self.layer_number),
            "scale": self.config.softmax_scale,
        }
        if is_decode_only:
            output = decode(q[:, 0], k, v, seqlens_k, block_table, **how)
        else:
            output = prefill(q[:, 0], k, v, cu_seqlens_q, seqlens_k, block_table, **how)
        return output[:, None]


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    blocks: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of one new token of each request.

    Args:
        q: [requests, heads, channels].
        k, v: the cache, [blocks, tokens of a block, key/value heads, channels].
        lengths: [requests], the number of keys of each request, with the new token's. 0: an unused slot.
        blocks: [requests, most blocks], the numbers of each request's blocks, in order. -1: no block.
        window: the tokens that a token attends to, itself included. None: all.
        scale: of the scores. None: 1 / sqrt(channels).

    Returns:
        [requests, heads, channels]
    """
    count = min(len(q), len(lengths))
    lengths = lengths[:count]
    used = -(-int(lengths.max()) // k.shape[1])
    ids = blocks[:count, :used].long().clamp(min=0)
    keys, values = (cache[ids].flatten(1, 2).transpose(1, 2) for cache in (k, v))
    places = torch.arange(keys.shape[2], device=q.device)
    mask = places < lengths[:, None]
    if window is not None:
        mask &= places >= lengths[:, None] - window
    # Memory that was never written may hold NaN. A mask does not remove NaN from a sum, so write zeros.
    keys, values = (x.masked_fill(~mask[:, None, :, None], 0) for x in (keys, values))
    mask[lengths == 0] = True  # nothing reads the result of an unused slot
    heads = q[:count, :, None]
    attended = F.scaled_dot_product_attention(
        heads, keys, values, attn_mask=mask[:, None, None], enable_gqa=True, scale=scale
    )
    output = torch.zeros_like(q)
    output[:count] = attended[:, :, 0]
    return output


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    blocks: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of several new tokens of each request.

    Args:
        q: [tokens, heads, channels], the requests one after another.
        starts: [requests + 1], the index of each request's first token in `q`, and of the end.
        k, v, lengths, blocks, window, scale: as in `decode`.

    Returns:
        [tokens, heads, channels]
    """
    output = torch.zeros_like(q)
    bounds, sizes = starts.tolist(), lengths.tolist()
    for i, size in enumerate(sizes):
        begin, end = bounds[i], bounds[i + 1]
        if begin == end or size == 0:
            continue
        ids = blocks[i, : -(-size // k.shape[1])].long()
        keys, values = (cache[ids].flatten(0, 1)[:size].transpose(0, 1) for cache in (k, v))
        new = end - begin  # the new tokens are the last tokens of the request
        mask = in_window(new, size, window, q.device)
        attended = F.scaled_dot_product_attention(
            q[begin:end].transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask,
            enable_gqa=True,
            scale=scale,
        )
        output[begin:end] = attended[0].transpose(0, 1)
    return output
