"""Where the documents of a micro-batch begin and end, and attention of each by itself."""

import torch
from torch import Tensor

from megatron_ladder.layers.attention.documents import Documents, each_by_itself
from megatron_ladder.layers.halves import half_of

NUMBERS = torch.tensor([[3, 3, 5, 5, 5], [7, 8, 8, 8, 3], [0] * 5, [0, 0, 0, 0, 1]])


def test_lengths_by_sequence() -> None:
    """A sequence ends a document, though the next one begins with the same number."""
    assert Documents(NUMBERS).lengths == [[2, 3], [1, 3, 1], [5], [4, 1]]


def test_in_one_row() -> None:
    documents = Documents(NUMBERS)
    row = documents.in_one_row(torch.device("cpu"))
    assert row is documents.in_one_row(torch.device("cpu"))
    assert row.qkv_format == "thd"
    assert row.cu_seqlens_q.tolist() == [0, 2, 5, 6, 9, 10, 15, 19, 20]
    assert row.cu_seqlens_q.dtype == torch.int32
    assert row.max_seqlen_q == row.max_seqlen_kv == 5


def test_halves_are_cut_by_sequences() -> None:
    documents = Documents(NUMBERS)
    given = {"attention_mask": None, "packed_seq_params": documents}
    first, second = (half_of(given, half)["packed_seq_params"].lengths for half in range(2))
    assert [*first, *second] == documents.lengths
    assert half_of(given, 0)["packed_seq_params"] is half_of(given, 0)["packed_seq_params"]
    without = {"packed_seq_params": None}
    assert half_of(without, 1) is without


def test_a_token_is_seen_by_its_own_document_alone() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The sum of all values up to a token."""
        assert query.shape[1] == 1
        return value.cumsum(0).flatten(2)

    ones = torch.ones(5, 4, 2, 3)
    found = each_by_itself(attend, Documents(NUMBERS), ones, ones[:, :, :1], ones[:, :, :1])
    assert found.shape == (5, 4, 3)
    expected = [[1, 2, 1, 2, 3], [1, 1, 2, 3, 1], [1, 2, 3, 4, 5], [1, 2, 3, 4, 1]]
    assert found[:, :, 0].T.tolist() == expected
