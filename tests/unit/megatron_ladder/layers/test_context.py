"""How ranks divide sequences, and which queries of a chunk see which keys."""

import pytest
import torch

from megatron_ladder.layers.context import chunks_of, parts_of_chunk, tokens_of
from megatron_ladder.layers.window import bias_of_last


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_have_all_tokens_and_as_many_scores(size: int) -> None:
    length = 12 * size
    places = torch.arange(length).expand(2, -1)
    ranks = [tokens_of(places, rank, size) for rank in range(size)]
    assert torch.cat(ranks, dim=1).sort(dim=1).values.equal(places)
    # A token attends to as many tokens as its place says, and itself.
    scores = {int((tokens[0] + 1).sum()) for tokens in ranks}
    assert scores == {length * (length + 1) // 2 // size}


def test_a_rank_has_an_early_and_a_late_chunk() -> None:
    assert [chunks_of(rank, 3) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert tokens_of(torch.arange(12)[None], 1, 3).tolist() == [[2, 3, 8, 9]]


@pytest.mark.parametrize(
    ("begin", "end", "queries", "keys"),
    [
        (0, 4, [3, 1], [3, 1]),  # the second document's first token
        (4, 8, [4], [5]),  # within the second document: it began a token before
        (8, 12, [1, 2, 1], [6, 2, 1]),  # its last token, the third one, the fourth's first
        (12, 16, [4], [5]),
    ],
)
def test_documents_of_a_chunk(begin: int, end: int, queries: list[int], keys: list[int]) -> None:
    assert parts_of_chunk([3, 6, 2, 5], begin, end) == (queries, keys)


def test_the_last_queries_see_the_keys_up_to_their_own() -> None:
    bias = bias_of_last(2, 3, 5, torch.float32, torch.device("cpu"))
    inf = -torch.inf
    assert bias.tolist() == [[0, 0, 0, 0, inf], [0, 0, 0, 0, 0]]
