"""Documents that do not attend to each other: core attention computes each by itself, and needs no mask.

Only core attention knows of documents. All tensors keep their shape [s, b, ...], and positions go on
through the sequence: rotary embeddings make the score of two tokens depend on the difference of their
positions alone (RoFormer, arXiv 2104.09864, equation 16).
"""

from collections.abc import Callable
from functools import cached_property
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class Documents(PackedSeqParams):
    """Where the documents of a micro-batch begin and end.

    megatron-core passes it from the model to each layer's core attention, through recomputation too, as
    `packed_seq_params`.

    Args:
        numbers: int [b, s], on the host: a number for each token, the same within a document. It differs
            between neighbouring documents.
    """

    def __init__(self, numbers: Tensor) -> None:
        assert numbers.device.type == "cpu", "to read it from a GPU, the host would wait"
        length = numbers.shape[1]
        # With "sbhd" megatron-core leaves the tensors' shape and the positions as they are.
        super().__init__(qkv_format="sbhd", max_seqlen_q=length, max_seqlen_kv=length)
        self._numbers = numbers
        self._in_one_row: PackedSeqParams | None = None

    @cached_property
    def lengths(self) -> list[list[int]]:
        """The tokens of each document, by sequence."""
        return [row.unique_consecutive(return_counts=True)[1].tolist() for row in self._numbers]

    @cached_property
    def halves(self) -> tuple["Documents", "Documents"]:
        """The documents of each half of the sequences (halves.py)."""
        first, second = self._numbers.chunk(2)
        return Documents(first), Documents(second)

    def in_one_row(self, device: torch.device) -> PackedSeqParams:
        """The documents as Transformer Engine takes them, for tensors [b s, heads, channels]: sequence
        after sequence. All layers share it."""
        if self._in_one_row is None:
            lengths = [length for row in self.lengths for length in row]
            starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            starts = starts.to(device, non_blocking=True)
            self._in_one_row = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=starts,
                cu_seqlens_kv=starts,
                max_seqlen_q=max(lengths),
                max_seqlen_kv=max(lengths),
            )
        return self._in_one_row


def each_by_itself(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    documents: Documents,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """Attention of each document by itself.

    Args:
        attend: causal attention of [length, 1, heads, channels] -> [length, 1, heads x channels].
        documents: of the micro-batch.
        query: [s, b, heads, channels].
        key, value: [s, b, key/value heads, channels].

    Returns:
        [s, b, heads x channels].
    """
    sequences = zip(
        documents.lengths, *(x.split(1, dim=1) for x in (query, key, value)), strict=True
    )
    attended = [
        torch.cat([attend(*one) for one in zip(*(x.split(lengths) for x in qkv), strict=True)])
        for lengths, *qkv in sequences
    ]
    return torch.cat(attended, dim=1)
