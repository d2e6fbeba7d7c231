"""Index files: made in parts by processes, whole or not at all, and byte for byte megatron-core's."""

import errno
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch.distributed as dist

from pretrain.config.data import DataConfig, Phase
from pretrain.config.presets import PRESETS
from pretrain.config.train import TrainConfig
from pretrain.data.checks import open_data
from pretrain.data.sequences import train_sequences
from pretrain.index import files
from pretrain.index import parts as run_parts
from pretrain.index.cache import _said_by_rank_0, is_made, make_index
from pretrain.index.parts import OrderPart, SplitPart
from tests.data_sets import write_data_set
from tests.held_out import validation_sequences

BATCH, LENGTH, STEPS = 8, 64, 20
STEP = BATCH * LENGTH  # tokens


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """All but the first are gone through several times; one has no validation split."""
    folder = tmp_path_factory.mktemp("data")
    return tuple(
        write_data_set(
            folder / name, train_documents=count, validation_documents=held_out, seed=count
        )
        for name, count, held_out in (("a", 100, 12), ("b", 30, 12), ("c", 20, 0))
    )


def config_for(paths: tuple[Path, ...], folder: Path, **data: object) -> TrainConfig:
    config = PRESETS["debug"]()
    weights = (3.0, 1.0, 2.0)[: len(paths)]
    data_config = DataConfig(
        **{"paths": paths, "weights": weights, "seq_length": LENGTH, "num_workers": 0, **data}
    )
    schedule = replace(config.schedule, train_steps=STEPS)
    return replace(
        config,
        data=data_config,
        global_batch_size=BATCH,
        schedule=schedule,
        output_dir=folder / "run",
    )


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "made.json"}


def by_megatron(config: TrainConfig, target: Path) -> dict[str, bytes]:
    """As megatron-core itself makes them, one after another."""
    folders = open_data(config)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    train_sequences(config, folders, target)
    validation_sequences(config, folders, target)
    dist.destroy_process_group()
    return content(target)


VARIANTS = {
    "one data set": {"paths": 1, "weights": (1.0,)},
    "a blend": {},
    "one data set of two has weight": {
        "phases": (Phase(6 * STEP, (1, 2, 1)),),
        "weights": (1, 0, 0),
    },
    "phases": {"phases": (Phase(6 * STEP, (1.0, 2.0, 0.0)), Phase(13 * STEP, (0.0, 1.0, 3.0)))},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_they_are_byte_for_byte_megatron_cores(
    variant: str, paths: tuple[Path, ...], tmp_path: Path
) -> None:
    options = dict(VARIANTS[variant])
    config = config_for(paths[: options.pop("paths", 3)], tmp_path, **options)
    folders, cache = open_data(config), tmp_path / "cache"
    assert not is_made(cache, config, folders)
    assert list(make_index(config, folders, cache))
    assert is_made(cache, config, folders)
    assert content(cache) == by_megatron(config, tmp_path / "theirs")
    assert not list(tmp_path.glob(".cache*"))


def test_tasks_share_the_parts_and_a_last_one_makes_the_rest(
    paths: tuple[Path, ...], tmp_path: Path
) -> None:
    config = config_for(paths, tmp_path, phases=VARIANTS["phases"]["phases"])
    folders, cache = open_data(config), tmp_path / "cache"
    made = []
    for rank in (2, 0, 1):
        before = set(content(cache)) if cache.exists() else set()
        list(make_index(config, folders, cache, rank, 3))
        made.append(set(content(cache)) - before)
    assert all(made) and not is_made(cache, config, folders)
    times = {file.name: file.stat().st_mtime_ns for file in cache.iterdir()}
    list(make_index(config, folders, cache))
    assert is_made(cache, config, folders)
    assert all((cache / name).stat().st_mtime_ns == time for name, time in times.items())
    assert content(cache) == by_megatron(config, tmp_path / "theirs")


def make_in(config: TrainConfig, cache: Path) -> None:
    os.setsid()  # for the test, which ends all its processes
    list(make_index(config, open_data(config), cache))


def test_what_was_made_before_an_end_is_not_made_again(
    paths: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with one part made, one in the middle of its files, and the others to come."""
    config, cache = config_for(paths, tmp_path), tmp_path / "cache"
    one_split, replace_file = run_parts.one_split, Path.replace

    def slowly(config, folder, split, *rest, made):
        if not made and folder.name == "b" and split == "train":
            time.sleep(1000)
        return one_split(config, folder, split, *rest, made=made)

    def half(self: Path, target: Path) -> Path:
        result = replace_file(self, target)
        if "dataset_index" in Path(target).name:
            time.sleep(1000)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(run_parts, "one_split", slowly)
        patch.setattr(Path, "replace", half)
        process = multiprocessing.get_context("fork").Process(target=make_in, args=(config, cache))
        process.start()
        whole = 0
        while whole < 1 or not list(cache.glob("*BlendedDataset*")):
            assert process.is_alive()
            whole = len(list(cache.glob("*-Sequences-*description.txt"))) if cache.exists() else 0
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    folders = open_data(config)
    assert list(tmp_path.glob(".cache.*")) and not is_made(cache, config, folders)
    # Of parts that are whole: others may have files too.
    made = tuple(
        f.name.removesuffix("description.txt") for f in cache.glob("*-Sequences-*description.txt")
    )
    before = {f.name: f.stat().st_mtime_ns for f in cache.iterdir() if f.name.startswith(made)}
    list(make_index(config, folders, cache))
    after = {f.name: f.stat().st_mtime_ns for f in cache.glob("*")}
    assert before and before.items() <= after.items()
    assert content(cache) == by_megatron(config, tmp_path / "theirs")
    assert not list(tmp_path.glob(".cache.*"))


def test_a_failure_of_the_disk_is_said_and_what_is_made_stays(
    paths: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, cache = config_for(paths, tmp_path), tmp_path / "cache"
    one_split = run_parts.one_split

    def full(config, folder, split, *rest, made):
        if not made and folder.name == "c":
            raise OSError(errno.ENOSPC, "No space left on device", "shuffle_index.npy")
        return one_split(config, folder, split, *rest, made=made)

    monkeypatch.setattr(run_parts, "one_split", full)
    with pytest.raises(OSError, match=r"No space left on device \(shuffle_index.npy\)") as raised:
        list(make_index(config, open_data(config), cache))
    assert raised.value.filename == f"index files of {paths[2]}/train"
    assert not list(tmp_path.glob(".cache.*"))


def test_a_killed_process_is_said(
    paths: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(paths, tmp_path)
    monkeypatch.setattr(SplitPart, "make", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(OSError, match="ended by signal 9: was memory full"):
        list(make_index(config, open_data(config), tmp_path / "cache"))


def test_no_more_parts_at_a_time_than_memory_has_room_for(
    paths: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(paths, tmp_path)
    folders = open_data(config)
    has_room = False
    marks = tmp_path / "marks"
    marks.mkdir()

    def make(self, config, folders, target: Path) -> None:
        mine = marks / str(os.getpid())
        mine.touch()
        (tmp_path / f"most-{len(list(marks.iterdir()))}").touch()
        time.sleep(0.1)
        end = time.monotonic() + 30  # a slow machine may start the next process only then
        while has_room and not (tmp_path / "most-2").exists() and time.monotonic() < end:
            time.sleep(0.01)
        mine.unlink()
        for file in self.files:
            (target / file.name).touch()

    monkeypatch.setattr(SplitPart, "make", make)
    monkeypatch.setattr(OrderPart, "make", make)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(files, "memory_here", lambda: 0)
    list(make_index(config, folders, tmp_path / "cache"))
    assert [f.name for f in tmp_path.glob("most-*")] == ["most-1"]
    has_room = True
    monkeypatch.setattr(files, "memory_here", lambda: 1 << 40)
    list(make_index(config, folders, tmp_path / "other"))
    assert len(list(tmp_path.glob("most-*"))) > 1


def test_a_process_makes_several_small_parts(
    paths: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(paths, tmp_path)
    parts = run_parts.index_parts(config, open_data(config), tmp_path / "cache")
    order = next(part for part in parts if isinstance(part, OrderPart))
    splits = [part for part in parts if part is not order]
    left, room = [order, *splits], 1 << 40
    assert files._next(left, room, 1 << 40, must=False) == [order]
    together = sum(part.tokens for part in splits[:3])
    assert files._next(left, room, together, must=False) == splits[:3]
    assert files._next(left, 0, together, must=False) == []
    assert files._next(left, 0, together, must=True) == splits[3:4]
    assert left == splits[4:]


def test_progress_says_rate_and_time_left(
    paths: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(paths, tmp_path)
    parts = run_parts.index_parts(config, open_data(config), tmp_path / "cache")
    splits = [part for part in parts if isinstance(part, SplitPart)]
    order = next(part for part in parts if isinstance(part, OrderPart))
    assert sum(part.tokens for part in splits if part.split == "validation") == 2 * 12 * 64
    clock = 100.0
    monkeypatch.setattr(files.time, "monotonic", lambda: clock)
    order.begin()
    report = files._Report(parts, parts)
    clock += 10
    report.done(splits[:1])
    numbers = np.frombuffer(order.shared, np.int16)
    numbers[: len(numbers) // 4] = 1
    first, words = splits[0].tokens, report.now([]).words
    in_all = sum(part.tokens for part in parts)
    assert words.startswith(f"index files: 1 of {len(parts)} parts, {first / 1000:.2f} k of ")
    assert f"({first / 10:.0f}/s), 25% of the order of {order.size} sequences" in words
    left = max((in_all - first) / (first / 10), 30)
    assert words.endswith(f", about {left:.0f} s left")


def test_ranks_that_wait_end_when_the_first_rank_has_ended() -> None:
    store = Mock()
    store.check.side_effect = dist.DistNetworkError("Connection reset by peer")
    with pytest.raises(SystemExit, match="1"):
        next(_said_by_rank_0(store))
