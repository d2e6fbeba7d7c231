"""Transformer Engine's attention of documents that do not attend to each other."""

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_ladder.layers.attention.documents import Documents


class TEDocumentsAttention(TEDotProductAttention):
    """Transformer Engine's attention, given all documents of a micro-batch one after another."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType,
        attention_bias: None = None,
        packed_seq_params: Documents | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As `TorchAttention.forward` (megatron_ladder/layers/attention/core.py)."""
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type, **kwargs)
        assert attention_mask is None and attention_bias is None
        length, batch = query.shape[:2]
        attended = super().forward(
            *(x.transpose(0, 1).flatten(0, 1).contiguous() for x in (query, key, value)),
            None,
            AttnMaskType.padding_causal,
            packed_seq_params=packed_seq_params.in_one_row(query.device),
            **kwargs,
        )
        return attended.view(batch, length, -1).transpose(0, 1).contiguous()
