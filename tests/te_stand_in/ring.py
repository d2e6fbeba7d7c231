"""What Transformer Engine's context parallelism computes, by gathering.

Its ring needs several GPUs. Here keys and values are gathered, and put in the order of the sequence by
Transformer Engine's own lists of chunks.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

calls: list[str] = []
"""Of each call, in order: how keys and values go from rank to rank."""


def install() -> None:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    TEDotProductAttention.cp_stream = object()  # a CPU has no streams


def attend_over_ranks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    cp_group: Any,
    cp_global_ranks: list[int],
    cp_stream: Any,
    cp_comm_type: str,
    qkv_layout: str,
    attn_mask_type: str,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    window_size: tuple[int, int],
    **_: Any,
) -> Tensor:
    """Causal attention [s/n, b, heads, channels] -> [s/n, b, heads x channels] of a rank's tokens."""
    from transformer_engine.pytorch.attention.dot_product_attention.context_parallel import (
        get_seq_chunk_ids_for_reordering_after_attn,
        get_seq_chunk_ids_for_reordering_before_attn,
    )

    size, rank, own = cp_group.size(), cp_group.rank(), len(query)
    assert cp_global_ranks == dist.get_process_group_ranks(cp_group) and cp_stream is not None
    assert (qkv_layout, attn_mask_type) == ("sbhd_sbhd_sbhd", "causal")
    assert max_seqlen_q == max_seqlen_kv == size * own
    calls.append(cp_comm_type)
    in_order = get_seq_chunk_ids_for_reordering_before_attn(size, "cpu").long()
    by_rank = get_seq_chunk_ids_for_reordering_after_attn(size, "cpu").long()

    def whole(x: Tensor) -> Tensor:
        x = gather_from_sequence_parallel_region(x, group=cp_group)
        return x.unflatten(0, (2 * size, -1))[in_order].flatten(0, 1)

    places = torch.arange(size * own)
    mine = places.unflatten(0, (2 * size, -1))[by_rank].flatten()[rank * own : (rank + 1) * own]
    before, behind = window_size
    assert behind == 0
    seen = places <= mine[:, None]
    if before >= 0:
        assert cp_comm_type != "p2p"  # Transformer Engine refuses it
        seen &= places >= mine[:, None] - before
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, whole(key), whole(value)))
    out = F.scaled_dot_product_attention(query, key, value, seen, scale=scale, enable_gqa=True)
    return out.permute(2, 0, 1, 3).flatten(2)
