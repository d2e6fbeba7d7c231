"""What torch.save wrote, read as data: against torch.load, and with everything in it that may be wrong."""

import io
import pickle
import zipfile
from collections import OrderedDict
from io import BufferedReader
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ladder.reading.archives import open_archive
from megatron_ladder.reading.contents import check_format, object_at, read_common
from megatron_ladder.reading.index import Place
from megatron_ladder.reading.pickles import read_pickle
from megatron_ladder.reading.plain_files import NotData
from megatron_ladder.reading.saved import ITEM_BYTES, read_saved
from megatron_ladder.reading.tensors import read_tensor, with_tensors
from tests.hostile import Command, torch_saved

NO_NAMES: frozenset[str] = frozenset()


def opened(content: bytes) -> BufferedReader:
    return io.BufferedReader(io.BytesIO(content))


def read(content: bytes) -> Any:
    file = opened(content)
    return with_tensors(read_saved(file, 0, len(content)), file)


def test_values_are_those_that_torch_reads() -> None:
    value: dict[Any, Any] = {
        "scheduler": {"max_lr": 3e-3, "steps": 7, "far": 2**40, "less": -(2**40), "name": "ä"},
        "groups": [{"betas": (0.9, 0.95), "params": [], "on": True, "off": False, "none": None}],
        "ordered": OrderedDict(a=1, b=OrderedDict()),
        3: [b"bytes"[:0], "x" * 300, torch.Size([2, 3])],
        "rng": {"cpu": torch.get_rng_state(), "scales": torch.rand(3, 2), "no": torch.empty(0)},
        "batches": list(range(3000)),
    }
    value[3].pop(0)
    got, expected = read(torch_saved(value)), torch.load(io.BytesIO(torch_saved(value)))
    for name in ("cpu", "scales", "no"):
        assert torch.equal(got["rng"].pop(name), expected["rng"].pop(name))
    assert got == expected


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_tensors_are_those_that_torch_reads(dtype: str) -> None:
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (3, 4, 5 * ITEM_BYTES[dtype]), generator=draw, dtype=torch.uint8)
    tensor = bits.view(getattr(torch, dtype))
    content = torch_saved(tensor)
    whole = read_tensor(opened(b"before" + content), 6, len(content))
    assert whole.dtype == tensor.dtype
    assert torch.equal(whole.view(torch.uint8), bits)
    part = torch_saved(tensor[1])  # a view: its elements begin later in the storage
    assert torch.equal(read_tensor(opened(part), 0, len(part)).view(torch.uint8), bits[1])


def test_members_are_those_that_zipfile_finds() -> None:
    content = torch_saved([torch.rand(100), torch.rand(7)])
    archive = open_archive(opened(content), 0, len(content))
    with zipfile.ZipFile(io.BytesIO(content)) as expected:
        names = [name.partition("/")[2] for name in expected.namelist()]
        assert list(archive.members) == names
        for name, whole in zip(names, expected.namelist(), strict=True):
            assert archive.read(name) == expected.read(whole)


def test_an_archive_of_more_than_4_gb_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """zipfile writes the same fields, when its limit is lowered."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([1], protocol=2))
        archive.writestr("archive/data/0", bytes(500))
        archive.writestr("archive/version", "3\n")
    content = written.getvalue()
    assert b"PK\6\6" in content
    read_archive = open_archive(opened(content), 0, len(content))
    assert read_archive.read("data/0") == bytes(500)
    assert read_archive.read("version") == b"3\n"
    assert read(content) == [1]


def changed(content: bytes, method: int = 0, **members: bytes) -> bytes:
    """An archive with other members."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w", method) as new:
        for name in old.namelist():
            member = name.partition("/")[2].replace(".", "_").replace("/", "_")
            new.writestr(name, members.get(member, old.read(name)))
    return written.getvalue()


def test_compressed_members_are_refused() -> None:
    """A kilobyte could become a gigabyte."""
    content = changed(torch_saved(torch.zeros(2**20)), zipfile.ZIP_DEFLATED)
    assert len(content) < 2**16
    with pytest.raises(NotData, match=r"not an archive as torch\.save writes it"):
        read(content)


def test_a_tensor_takes_no_more_memory_than_its_elements() -> None:
    """torch.load makes the storage as large as the pickle says."""
    content = torch_saved(torch.zeros(1000))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickled = archive.read("archive/data.pkl")
    # Its number of elements and its shape, both as BININT2.
    large = pickled.replace(b"M\xe8\x03", b"J\xff\xff\xff\x7f")
    assert large != pickled
    with pytest.raises(NotData, match="larger than its elements"):
        read(changed(content, data_pkl=large))


def test_what_is_expanded_is_refused() -> None:
    """Its one element would be copied 2^40 times by what uses it."""
    with pytest.raises(NotData, match="has a tensor as no checkpoint needs it"):
        read(torch_saved(torch.zeros(1).expand(2**40)))


class Reference:
    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (torch.zeros(1), 0, (1,), (1,), False, {})


class Bytearray:
    """torch's own restricted reader makes 2^40 bytes of it."""

    def __reduce__(self) -> Any:
        return bytearray, (2**40,)


NOT_DATA = {
    "a command": (Command(Path("marker")), "names 'posix.system'"),
    "memory": (Bytearray(), "names '__builtin__.bytearray'"),
    "a function of torch's": (torch.load, "names 'torch.serialization.load'"),
    "a class": (torch.nn.Linear, "names 'torch.nn.modules.linear.Linear'"),
    "a tensor of a tensor": (Reference(), "has a tensor without elements"),
    "a key of a pair": ({(1, 2): 3}, "has a key that is neither a string nor an integer"),
    "a set": ({1, 2}, "names '__builtin__.set'"),
    "a large integer": ([2**64], "has an integer of more than 8 bytes"),
    "a complex tensor": (
        torch.zeros(1, dtype=torch.complex64),
        "names 'torch.ComplexFloatStorage'",
    ),
    "a sparse tensor": (torch.eye(2).to_sparse(), "names 'torch._utils._rebuild_sparse_tensor'"),
}


@pytest.mark.parametrize("what", NOT_DATA)
def test_what_is_no_data_is_refused(what: str) -> None:
    value, said = NOT_DATA[what]
    with pytest.raises(NotData) as refused:
        read(torch_saved(value))
    assert said in str(refused.value)


def test_a_list_in_itself_and_lists_that_multiply_are_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(NotData, match="more values, or more deeply nested ones"):
        read(torch_saved(loop))
    many: list[Any] = [0]
    for _ in range(40):  # 2^40 values in a pickle of 500 bytes
        many = [many, many]
    with pytest.raises(NotData, match="more values, or more deeply nested ones"):
        read(torch_saved(many))


@pytest.mark.parametrize(
    ("pickled", "said"),
    [
        (b"\x80\x02" + b"]" * 10**6, "nested too deeply"),
        (b"\x80\x02" + b"(" * 10**6, "nested too deeply"),
        # A key that Python would hash for ever: pairs of pairs, 60 deep.
        (
            b"\x80\x04}N\x94" + b"h\x00h\x00\x86\x94" + b"0.",
            "an instruction that no checkpoint needs",
        ),
        (b"\x80\x02cos\nsystem\n.", "names 'os.system'"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "names 'os.system'"),
        (b"\x80\x02ios\nsystem\n.", "an instruction that no checkpoint needs (0x69)"),
        (b"\x80\x02\x82\x01.", "an instruction that no checkpoint needs (0x82)"),
        (b"\x80\x04X\xff\xff\xff\x7fabc.", "ends too early"),
        (
            b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\xff.",
            "an instruction that no checkpoint needs",
        ),
        (b"\x80\x04h\x07.", "is not a pickle as torch writes it (KeyError)"),
        (b"\x80\x04]]a", "ends too early"),
        (b"\x80\x04.", "is not a pickle as torch writes it (ValueError)"),
        (b"\x80\x04}]a.", "is not a pickle as torch writes it (TypeError)"),
        (b"", "ends too early"),
    ],
)
def test_pickles_that_torch_does_not_write(pickled: bytes, said: str) -> None:
    with pytest.raises(NotData) as refused:
        read_pickle(pickled, NO_NAMES)
    assert said in str(refused.value)


def test_pickles_in_the_state_of_layers_are_not_read() -> None:
    """Transformer Engine unpickles bytes. Scales as numbers, and states without anything, are kept."""
    pickled = torch.frombuffer(bytearray(pickle.dumps(Command(Path("marker")))), dtype=torch.uint8)
    states = [pickled, torch.tensor([0.5, 2.0]), torch.empty(0, dtype=torch.uint8), None]
    content = torch_saved(states)
    file, place = opened(content), Place("__0_0.distcp", 0, len(content))
    got = with_tensors(object_at(file, "decoder.linear._extra_state/shard_0_4", place), file)
    assert got[0] is None
    assert got[1].tolist() == [0.5, 2.0]
    assert got[2].numel() == 0
    assert got[3] is None
    assert torch.equal(with_tensors(object_at(file, "rng/shard_0_1", place), file)[0], pickled)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"[" * 4000,
        b'{"sharded_backend": "zarr", "sharded_backend_version": 1}',
        b"\xff",
        b"{}",
    ],
)
def test_another_format_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_bytes(content)
    with pytest.raises(
        NotData, match=r"metadata\.json (is not what was written|names another format)"
    ):
        check_format(tmp_path)


def test_common_pt_says_its_name(tmp_path: Path) -> None:
    (tmp_path / "common.pt").write_bytes(torch_saved({"progress": {"step": 3}}))
    assert read_common(tmp_path) == {"progress": {"step": 3}}
    (tmp_path / "common.pt").write_bytes(torch_saved(Command(tmp_path / "marker")))
    with pytest.raises(NotData, match=r"common\.pt names 'posix\.system'"):
        read_common(tmp_path)
    (tmp_path / "common.pt").write_bytes(b"nothing")
    with pytest.raises(NotData, match=r"common\.pt is not an archive as torch\.save writes it"):
        read_common(tmp_path)
