"""A checkpoint's index: as torch wrote it, and with everything in it that may be wrong."""

import dataclasses
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from megatron_ladder.reading.in_megatron import DataReader
from megatron_ladder.reading.index import Chunk, _fill, check_files, read_index
from megatron_ladder.reading.plain_files import NotData
from tests.checkpoints import write_checkpoint
from tests.hostile import Command, change_index


def test_it_says_what_torch_s_reader_says(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    read, expected = DataReader(folder).read_metadata(), FileSystemReader(folder).read_metadata()
    assert read.state_dict_metadata == expected.state_dict_metadata
    assert read.storage_data == expected.storage_data
    index = read_index(folder)
    assert list(index.tensors) == ["weight", "bias"]
    assert list(index.objects) == ["rng/shard_0_1"]
    assert [chunk.offsets for chunk in index.tensors["weight"].chunks] == [
        (0, 0),
        (0, 3),
        (2, 0),
        (2, 3),
    ]


def _size(name: str, *size: int) -> Callable[[Any], None]:
    def change(index: Any) -> None:
        index.state_dict_metadata[name].size = torch.Size(size)

    return change


def _chunk(name: str, number: int, **changes: Any) -> Callable[[Any], None]:
    def change(index: Any) -> None:
        chunks = index.state_dict_metadata[name].chunks
        old = chunks[number]
        chunks[number] = dataclasses.replace(old, **{k: torch.Size(v) for k, v in changes.items()})
        place = index.storage_data.pop(MetadataIndex(name, old.offsets))
        index.storage_data[MetadataIndex(name, chunks[number].offsets)] = place

    return change


def _place(**changes: Any) -> Callable[[Any], None]:
    def change(index: Any) -> None:
        key = MetadataIndex("bias", torch.Size([0]))
        index.storage_data[key] = dataclasses.replace(index.storage_data[key], **changes)

    return change


def _one_number_deep(index: Any) -> None:
    index.state_dict_metadata["bias"].size = (((3,),),)


def _too_large(index: Any) -> None:
    """One part of 2^60 elements, as consistent as an index can make it."""
    entry, key = index.state_dict_metadata["bias"], MetadataIndex("bias", torch.Size([0]))
    entry.size = torch.Size([2**60])
    entry.chunks = [ChunkStorageMetadata(torch.Size([0]), torch.Size([2**60]))]
    index.storage_data[key] = dataclasses.replace(index.storage_data[key], length=2**61)


def _many(index: Any) -> None:
    """A thousand large tensors in the same bytes."""
    key = MetadataIndex("bias", torch.Size([0]))
    for number in range(1000):
        index.state_dict_metadata[f"b{number}"] = index.state_dict_metadata["bias"]
        index.storage_data[MetadataIndex(f"b{number}", torch.Size([0]))] = index.storage_data[key]


def _without_place(index: Any) -> None:
    del index.storage_data[MetadataIndex("weight", torch.Size([0, 3]))]


def _without_chunk(index: Any) -> None:
    del index.state_dict_metadata["weight"].chunks[1]


def _twice(index: Any) -> None:
    index.state_dict_metadata["weight"].chunks.append(index.state_dict_metadata["weight"].chunks[1])


def _other_place(index: Any) -> None:
    place = next(iter(index.storage_data.values()))
    index.storage_data[MetadataIndex("unknown", torch.Size([0]))] = place


def _no_dtype(index: Any) -> None:
    index.state_dict_metadata["bias"].properties.dtype = torch.complex64


WRONG: dict[str, tuple[Callable[[Any], None], str]] = {
    "2^60 elements": (_size("bias", 2**60), "parts of 'bias' that overlap, or that are not the wh"),
    "2^60 elements in a part": (_too_large, "says that __0_0.distcp has 2,305,843,009,213,"),
    "more elements than axes hold": (_size("bias", *[2**62] * 8), "a part of 'bias' with other ax"),
    "nine axes": (_size("bias", *[1] * 9), "a shape or an offset that is not of sizes"),
    "a shape of shapes": (_one_number_deep, "a shape or an offset that is not of sizes"),
    "part beyond the end": (_chunk("bias", 0, offsets=[1]), "overlap, or that are not the whole"),
    "overlapping parts": (
        _chunk("weight", 1, offsets=[0, 2]),
        "overlap, or that are not the whole",
    ),
    "a missing part": (
        _without_chunk,
        "says where a part of 'weight' is stored, which it does not",
    ),
    "a part twice": (_twice, "'weight' has more elements than are stored"),
    "a part stored nowhere": (_without_place, "'weight' has more elements than are stored"),
    "an unknown tensor": (_other_place, "says where 'unknown' is stored, which it does not have"),
    "a file above": (_place(relative_path="../x.distcp"), "names a file that is none of the check"),
    "an absolute name": (_place(relative_path="/dev/zero.distcp"), "names a file that is none"),
    "another file": (_place(relative_path="common.pt"), "names a file that is none of the check"),
    "a missing file": (_place(relative_path="__7_0.distcp"), "__7_0.distcp"),
    "beyond the file": (_place(offset=2**50), "says that __0_0.distcp has 1,125,899,"),
    "a negative place": (_place(offset=-1), "has no place for 'bias'"),
    "fewer bytes than elements": (_place(length=5), "'bias' has more elements than are stored"),
    "two things at a place": (_place(offset=0), "has two things at one place of __0_0.distcp"),
    "many things at a place": (_many, "has two things at one place of __0_0.distcp"),
    "a transformation": (_place(transform_descriptors=["zstd"]), "compressed or encrypted"),
    "an unknown dtype": (_no_dtype, "names 'torch.complex64', which no checkpoint needs"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_contradicts_itself_or_its_files_is_refused(wrong: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    change, said = WRONG[wrong]
    change_index(folder, change)
    with pytest.raises((NotData, FileNotFoundError)) as refused:
        check_files(read_index(folder), folder)
    assert said in str(refused.value)


def test_empty_parts_may_be_where_others_begin(tmp_path: Path) -> None:
    """Ranks without a share of the optimizer's state write such parts."""
    folder = write_checkpoint(tmp_path / "checkpoint")

    def change(index: Any) -> None:
        chunks = index.state_dict_metadata["bias"].chunks
        for offset in (0, 3):
            empty = ChunkStorageMetadata(torch.Size([offset]), torch.Size([0]))
            chunks[:] = [empty, *chunks, empty]

    change_index(folder, change)
    tensor = read_index(folder).tensors["bias"]
    assert [chunk.place is None for chunk in tensor.chunks] == [True, True, False, True, True]


def test_negative_sizes_are_refused(tmp_path: Path) -> None:
    """torch.Size itself refuses them, so the pickle is changed."""
    folder = write_checkpoint(tmp_path / "checkpoint")
    change_index(folder, _size("bias", 0x55667788))
    content = (folder / ".metadata").read_bytes()
    assert content.count(b"J\x88\x77\x66\x55") == 1
    (folder / ".metadata").write_bytes(content.replace(b"J\x88\x77\x66\x55", b"J\xff\xff\xff\xff"))
    with pytest.raises(NotData, match="a shape or an offset that is not of sizes"):
        read_index(folder)


def test_a_name_may_be_there_once(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    change_index(folder, lambda index: index.state_dict_metadata.update(kias=None))
    content = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(content.replace(b"\x8c\x04kias", b"\x8c\x04bias"))
    with pytest.raises(NotData, match="has a name twice"):
        read_index(folder)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_links_out_of_the_folder_and_pipes_are_refused(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotData, match="is a link to a file outside of the folder"):
        check_files(read_index(folder), folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(NotData, match="is not a regular file"):
        check_files(read_index(folder), folder)
    (folder / name).unlink()
    (tmp_path / "elsewhere").rename(folder / "inside.distcp")
    (folder / name).symlink_to("inside.distcp")
    assert read_index(folder)


def test_nothing_that_it_names_runs(tmp_path: Path) -> None:
    folder, marker = write_checkpoint(tmp_path / "checkpoint"), tmp_path / "marker"
    (folder / ".metadata").write_bytes(pickle.dumps(Command(marker)))
    with pytest.raises(
        NotData, match=r"\.metadata names 'posix.system', which no checkpoint needs"
    ):
        read_index(folder)
    assert not marker.exists()


def test_parts_fill_a_tensor_exactly() -> None:
    """By the signs of corners, against counting each element."""
    draw = torch.Generator().manual_seed(0)
    number = lambda least, most: int(torch.randint(least, most + 1, (), generator=draw))  # noqa: E731
    seen = set()
    for _ in range(4000):
        axes = number(0, 3)
        shape = tuple(number(1, 3) for _ in range(axes))
        chunks, counts = [], torch.zeros([6] * axes)
        for _ in range(number(1, 3)):
            offsets = tuple(number(0, 2) for _ in shape)
            sizes = tuple(number(0, 3) for _ in shape)
            chunks.append(Chunk(offsets, sizes, None))
            counts[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] += 1
        expected = torch.zeros([6] * axes)
        expected[tuple(slice(0, n) for n in shape)] = 1
        assert _fill(shape, chunks) == bool((counts == expected).all()), (shape, chunks)
        seen.add(_fill(shape, chunks))
    assert seen == {True, False}


def test_an_index_of_many_parts_is_read(tmp_path: Path) -> None:
    folder, parts = write_checkpoint(tmp_path / "checkpoint"), 20_000

    def change(index: Any) -> None:
        entry, key = index.state_dict_metadata["bias"], MetadataIndex("bias", torch.Size([0]))
        old = index.storage_data.pop(key)
        entry.size = torch.Size([parts])
        one = torch.Size([1])
        entry.chunks = [ChunkStorageMetadata(torch.Size([i]), one) for i in range(parts)]
        for i in range(parts):
            where = MetadataIndex("bias", torch.Size([i]))
            place = dataclasses.replace(old, relative_path="__9_0.distcp", offset=2 * i, length=2)
            index.storage_data[where] = place

    change_index(folder, change)
    (folder / "__9_0.distcp").write_bytes(bytes(2 * parts))
    assert len(read_index(folder).tensors["bias"].chunks) == parts
