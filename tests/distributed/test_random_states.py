"""Random states belong to pipeline stages and tensor ranks: they are restored where these are the same."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from pretrain.loop.step import train_step
from pretrain.run.checkpoint import load_checkpoint
from pretrain.run.random_states import states as random_states
from tests.distributed.layouts import Layout, batches, configuration, micro_batches, start
from tests.distributed.resharding import save
from tests.distributed.test_documents import packed_config, packed_micro_batches
from tests.ranks import run_ranks

SavedAt = Callable[[Layout], tuple[Path, list[dict[str, Any]]]]


def begin(layout: Layout) -> tuple[Any, tuple[Any, Any, Any]]:
    config = configuration("ladder", layout)
    model = replace(config.model, num_layers=2, hidden_dropout=0.2, attention_dropout=0.2)
    config = replace(config, model=model)
    return config, start(config)


def train(config: Any, parts: tuple[Any, Any, Any], batch: int) -> float:
    return train_step(*parts, iter(micro_batches(batches()[batch], config)), config)[0]


def saved(layout: Layout, checkpoint: Path) -> dict[str, Any]:
    """A step, a checkpoint, another step; what states and losses were."""
    config, parts = begin(layout)
    train(config, parts, 0)
    save(parts, checkpoint)
    states = random_states()
    return {"place": place(), "states": states, "loss": train(config, parts, 1)}


def opened(layout: Layout, checkpoint: Path) -> dict[str, Any]:
    config, parts = begin(layout)
    load_checkpoint(checkpoint, *parts)
    states = random_states()
    return {"place": place(), "states": states, "loss": train(config, parts, 1)}


def begin_packed(dp: int) -> tuple[Any, tuple[Any, Any, Any]]:
    config = packed_config("ladder", Layout(dp=dp))
    config = replace(config, model=replace(config.model, num_layers=2, attention_dropout=0.2))
    return config, start(config)


def train_packed(config: Any, parts: tuple[Any, Any, Any]) -> float:
    return train_step(*parts, iter(packed_micro_batches(config)), config)[0]


def saved_packed(checkpoint: Path) -> dict[str, Any]:
    config, parts = begin_packed(2)
    train_packed(config, parts)
    save(parts, checkpoint)
    return {"states": random_states(), "loss": train_packed(config, parts)}


def opened_packed(checkpoint: Path, dp: int = 2) -> dict[str, Any]:
    config, parts = begin_packed(dp)
    load_checkpoint(checkpoint, *parts)
    return {"states": random_states(), "loss": train_packed(config, parts)}


@pytest.fixture(scope="module")
def saved_at(tmp_path_factory: pytest.TempPathFactory) -> SavedAt:
    """What `saved` returned of each rank, and its checkpoint, which nobody changes."""
    places: dict[Layout, tuple[Path, list[dict[str, Any]]]] = {}

    def found(layout: Layout) -> tuple[Path, list[dict[str, Any]]]:
        if layout not in places:
            folder = tmp_path_factory.mktemp("saved")
            ranks = run_ranks(layout.ranks, saved, layout, folder / "checkpoint", tmp_path=folder)
            places[layout] = folder / "checkpoint", ranks
        return places[layout]

    return found


def place() -> tuple[int, int]:
    return (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one["states"][name], other["states"][name]) for name in one["states"])


@pytest.mark.parametrize(
    "layout", [Layout(tp=2), Layout(pp=2, accumulation=2), Layout(dp=2), Layout(cp=2)]
)
def test_the_same_layout_goes_on_with_the_same_dropout(
    layout: Layout, saved_at: SavedAt, tmp_path: Path
) -> None:
    checkpoint, before = saved_at(layout)
    after = run_ranks(2, opened, layout, checkpoint, tmp_path=tmp_path)
    for one, other in zip(before, after, strict=True):
        assert same(one, other)
        assert one["loss"] == other["loss"]


def test_documents_make_data_parallel_ranks_drop_differently(tmp_path: Path) -> None:
    """Attention draws for each document by itself, and each rank has other documents."""
    checkpoint = tmp_path / "checkpoint"
    before = run_ranks(2, saved_packed, checkpoint, tmp_path=tmp_path)
    assert not same(*before)
    after = run_ranks(2, opened_packed, checkpoint, tmp_path=tmp_path)
    for one, other in zip(before, after, strict=True):
        assert same(one, other)
        assert one["loss"] == other["loss"]
    alone = run_ranks(1, opened_packed, checkpoint, 1, tmp_path=tmp_path)
    assert not any(same(alone[0], rank) for rank in before), "seeded anew"


def test_other_numbers_of_data_parallel_ranks_take_the_states_of_their_place(
    tmp_path: Path,
) -> None:
    """Also where the ranks' numbers stand for other places: at TP 2, PP 2 rank 1 is a tensor rank."""
    layout = Layout(tp=2, dp=2)
    before = run_ranks(4, saved, layout, tmp_path / "checkpoint", tmp_path=tmp_path)
    after = run_ranks(2, opened, Layout(tp=2), tmp_path / "checkpoint", tmp_path=tmp_path)
    for one in after:
        assert all(same(one, other) == (one["place"] == other["place"]) for other in before)


@pytest.mark.parametrize(
    ("first", "second"),
    [(Layout(pp=2, accumulation=2), Layout(tp=2)), (Layout(dp=2), Layout(tp=2))],
)
def test_another_layout_is_seeded_anew(
    first: Layout, second: Layout, saved_at: SavedAt, tmp_path: Path
) -> None:
    checkpoint, before = saved_at(first)
    after = run_ranks(2, opened, second, checkpoint, tmp_path=tmp_path)
    one, other = (rank["states"] for rank in after)
    assert torch.equal(one["cpu"], other["cpu"]), "tensor ranks must drop alike"
    assert not torch.equal(one["tracker.model-parallel-rng"], other["tracker.model-parallel-rng"])
    assert not any(torch.equal(one["cpu"], rank["states"]["cpu"]) for rank in before)


def test_stages_drop_differently_after_a_new_layout(saved_at: SavedAt, tmp_path: Path) -> None:
    checkpoint, _ = saved_at(Layout(tp=2))
    new = Layout(pp=2, accumulation=2)
    first, second = run_ranks(2, opened, new, checkpoint, tmp_path=tmp_path)
    assert not torch.equal(first["states"]["cpu"], second["states"]["cpu"])


def test_states_are_tensors_in_no_file_of_their_own(saved_at: SavedAt) -> None:
    checkpoint, _ = saved_at(Layout(dp=2))
    from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata

    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    states = {name: entry for name, entry in entries.items() if name.startswith("rng")}
    assert states
    for entry in states.values():
        assert isinstance(entry, TensorStorageMetadata)
        assert len(entry.chunks) == 1  # of two data-parallel ranks one has stored it
