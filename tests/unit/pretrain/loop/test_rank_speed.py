import pytest

from pretrain.loop.rank_speed import compare

# host, computing, reading a step's data, a whole step
USUAL = ("node0", 0.010, 0.001, 1.0)


@pytest.mark.parametrize(
    ("slow", "what"),
    [
        (("node1", 0.013, 0.001, 1.0), ["computing"]),
        (("node1", 0.011, 0.001, 1.0), []),
        # Ten times the others', and nobody waits for it.
        (("node1", 0.010, 0.010, 1.0), []),
        (("node1", 0.010, 0.300, 1.0), ["reading data"]),
        (("node1", 0.020, 0.300, 1.0), ["computing", "reading data"]),
    ],
)
@pytest.mark.parametrize("usual", [1, 2, 7])
def test_a_rank_is_named_where_it_is_behind_the_median(slow, what: list[str], usual: int) -> None:
    named = compare([USUAL] * usual + [slow])
    assert [n.what for n in named] == what
    assert all((n.rank, n.host) == (usual, "node1") for n in named)
    assert compare([USUAL] * (usual + 1)) == []
