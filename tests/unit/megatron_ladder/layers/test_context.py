"""How ranks divide sequences, and which queries of a chunk see which keys."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_ladder.layers.attention.context import (
    attend_over_ranks,
    chunks_of,
    parts_of_chunk,
    tokens_of,
)
from megatron_ladder.layers.attention.documents import Documents
from megatron_ladder.layers.attention.window import ALIGNMENT, bias_of_last, in_window


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
    bias = bias_of_last(2, 5, (2, 3), None, torch.float32, torch.device("cpu"))
    inf = -torch.inf
    assert bias.tolist() == [[0, 0, 0, 0, inf], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("window", [None, 21])
def test_every_bias_is_a_part_of_one(window: int | None) -> None:
    cpu = torch.device("cpu")
    places = set()
    for queries in (1, 2, 7, 40):
        for before in (0, 1, 5, 16, 20):
            keys = queries + before
            bias = bias_of_last(queries, keys, (40, 20), window, torch.bfloat16, cpu)
            assert bias.equal(
                torch.zeros(queries, keys, dtype=torch.bfloat16).masked_fill(
                    ~in_window(queries, keys, window, cpu), -torch.inf
                )
            )
            assert bias.storage_offset() % ALIGNMENT == bias.stride(0) % ALIGNMENT == 0
            places.add(bias.untyped_storage().data_ptr())
    assert len(places) == 1


def test_the_documents_of_a_chunk_share_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "megatron_ladder.layers.attention.context.gathered", lambda key, value, group: (key, value)
    )
    shared = []

    def attend(query: Tensor, key: Tensor, value: Tensor, most: tuple[int, int]) -> Tensor:
        if len(query) < len(key):
            shared.append((len(query), len(key), most))
        return query.flatten(2)

    # Two sequences over two ranks: this one has the tokens 4 to 7 and 8 to 11 of 16.
    documents = Documents(torch.tensor([[0] * 6 + [1] * 10, [0] * 3 + [1] * 2 + [2] * 4 + [3] * 7]))
    whole, query = torch.zeros(16, 2, 1, 1), torch.zeros(8, 2, 1, 1)
    group = SimpleNamespace(rank=lambda: 1, size=lambda: 2)
    attend_over_ranks(attend, group, documents, query, whole, whole)
    early, late = (4, 4), (4, 8)
    assert shared == [(2, 6, early), (4, 6, late), (1, 2, early), (1, 4, late)]
