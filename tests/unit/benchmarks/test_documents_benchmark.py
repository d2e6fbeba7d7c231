"""benchmarks/sequences/documents.py: what it compares is the same attention."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ladder.layers.attention.documents import Documents, each_by_itself
from sequences.documents import by_mask, config_of, documents_of, drawn_lengths


@pytest.mark.parametrize("mean", [3, 20, 5000])
def test_documents_have_the_length_that_is_asked_for(mean: int) -> None:
    config = config_of(64, 1, 2000, 2)
    drawn = drawn_lengths(3 * config.tokens_per_step, mean)
    by_step = documents_of(config, drawn, 3)
    assert by_step.shape == (3, 2, 2000)
    lengths = [n for row in Documents(by_step[0]).lengths for n in row]
    assert sum(lengths) == 4000
    if mean == 5000:  # longer than sequences
        assert len(lengths) < 6
    else:
        assert 0.6 * mean < sum(lengths) / len(lengths) < 1.6 * mean


def test_a_mask_computes_what_documents_by_themselves_do() -> None:
    documents = Documents(documents_of(config_of(64, 1, 30, 2), drawn_lengths(60, 5))[0])
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(30, 2, n, 4, generator=generator) for n in (4, 2, 2))

    def attend(*qkv: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in qkv)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)

    layer: Any = SimpleNamespace(softmax_scale=None)
    masked = by_mask(layer, query, key, value, packed_seq_params=documents)
    torch.testing.assert_close(masked, each_by_itself(attend, documents, query, key, value))
