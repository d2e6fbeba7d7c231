"""A checkpoint opens at every layout with the same values, bit by bit; also one of an old release."""

from pathlib import Path

import pytest

from tests.distributed.resharding import FORMS, LAYOUTS, OF_EXPERTS, read, write

# Each opens the one before: more and fewer ranks on every axis.
SOME = ["TP 2", "DP 3", "PP 2 in 2 chunks, DP 2", "CP 2, DP 2"]


SOME_OF_EXPERTS = [
    "EP 2",
    "TP 2, EP 1",
    "PP 2 in 2 chunks, EP 2",
    "DP 4, EP 2",
    "experts on 1 rank",
]


@pytest.mark.parametrize("shared", [False, True], ids=["bf16", "fp32, shared embedding"])
def test_moves_to_other_layouts(shared: bool, tmp_path: Path) -> None:
    # megatron-core gathers a shared embedding on two stages wrongly. Old releases corrected that.
    forms = ("shards",) if shared else FORMS
    names = SOME[2:] if shared else SOME
    folder = tmp_path / "checkpoints"
    write(folder, tmp_path, names, shared=shared, forms=forms)
    before = dict(zip(names[1:] + names[:1], names, strict=True))
    sources = {name: [source] for name, source in before.items()}
    found = read(folder, tmp_path, sources, shared=shared, forms=forms)
    expected = {name: {source: "bitwise"} for name, source in before.items()}
    assert found == {form: expected for form in forms}


@pytest.mark.parametrize(
    "names", [SOME_OF_EXPERTS, pytest.param(list(OF_EXPERTS), marks=pytest.mark.slow, id="all")]
)
def test_experts_move_to_other_layouts(names: list[str], tmp_path: Path) -> None:
    """Also into layouts whose optimizer has a part of its own for experts, and out of them."""
    folder = tmp_path / "checkpoints"
    write(folder, tmp_path, names, forms=("shards",))
    before = dict(zip(names[1:] + names[:1], names, strict=True))
    sources = {name: [source] for name, source in before.items()}
    found = read(folder, tmp_path, sources, forms=("shards",))
    assert found == {"shards": {n: {source: "bitwise"} for n, source in before.items()}}


@pytest.mark.slow
def test_opens_at_every_layout(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    write(folder, tmp_path, list(LAYOUTS))
    found = read(folder, tmp_path, {name: list(LAYOUTS) for name in LAYOUTS})
    row = dict.fromkeys(LAYOUTS, "bitwise")
    assert found == {form: dict.fromkeys(LAYOUTS, row) for form in FORMS}
