"""Core attention for machines without Transformer Engine."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor


class LocalCoreAttention(DotProductAttention):
    """megatron-core's; where it is compiled, torch's own.

    megatron-core's scores lie in a buffer of the process, and its dropout forks random states.
    torch.compile can trace neither, and would not compile the layer around it.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """[s, b, heads, channels] -> [s, b, heads x channels]; in the mask True is masked out."""
        if torch.compiler.is_compiling():
            return self.by_torch(query, key, value, attention_mask)
        return super().forward(query, key, value, attention_mask, *args, **kwargs)

    def by_torch(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """The same without dropout."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        causal = self.attn_mask_type == AttnMaskType.causal
        mask = None if causal or attention_mask is None else ~attention_mask
        scale = self.softmax_scale
        attended = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=True
        )
        return attended.permute(2, 0, 1, 3).flatten(2)
