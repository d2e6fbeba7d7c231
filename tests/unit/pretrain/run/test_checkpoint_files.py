from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_ladder.errors import UserError
from pretrain.convert.weights import checkpoint_weights
from pretrain.run import checkpoint_files
from pretrain.run.checkpoint import load_weights, newest_valid
from pretrain.run.checkpoint_files import damage, refuse_damaged, sums, write_manifest
from pretrain.run.folder import checkpoints, find_checkpoint


def make_checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"__{number}_0.distcp").write_bytes(bytes([step, number] * 1000))
    (folder / ".metadata").write_bytes(b"index")
    write_manifest(folder, sums([folder / "__0_0.distcp"]))
    return folder


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (
        lambda folder: flip_a_bit(folder / "__1_0.distcp"),
        "__1_0.distcp is not what was written",
    ),
    "truncated": (
        lambda folder: (folder / "__2_0.distcp").write_bytes(b"short"),
        "__2_0.distcp has 5 bytes, 2,000 were written",
    ),
    "missing": (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "no index": (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
    "half a manifest": (
        lambda folder: (folder / "manifest.json").write_text('{"files": {"a": '),
        "manifest.json is not a manifest",
    ),
    "another manifest": (
        lambda folder: (folder / "manifest.json").write_text('{"files": [1]}'),
        "manifest.json is not a manifest",
    ),
}


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_was_written_is_not_damaged(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 1)
    assert damage(folder, read=True) == ""
    assert find_checkpoint(tmp_path) == folder
    assert find_checkpoint(folder) == folder


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_one_before_a_damaged_one_is_used(
    kind: str, tmp_path: Path, one_rank: None, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    do, message = DAMAGES[kind]
    do(second)
    files = {p.name: p.read_bytes() for p in second.iterdir()}
    assert newest_valid(tmp_path) == first
    assert message in caplog.text
    assert "set aside as step_00000002.damaged" in caplog.text
    aside = tmp_path / "checkpoints/step_00000002.damaged"
    assert {p.name: p.read_bytes() for p in aside.iterdir()} == files
    assert checkpoints(tmp_path) == [first]
    do(make_checkpoint(tmp_path, 2))
    assert newest_valid(tmp_path) == first
    assert (tmp_path / "checkpoints/step_00000002.damaged-2").is_dir()
    do(first)
    assert newest_valid(tmp_path) is None


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_reads_weights_refuses_a_damaged_one(kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 1)
    do, message = DAMAGES[kind]
    do(folder)
    for read in (load_weights, checkpoint_weights):
        with pytest.raises(UserError, match=message) as refused:
            read(folder)
        assert "Give the checkpoint before it" in str(refused.value)
    if kind == "a flipped bit":  # sizes alone do not show it
        refuse_damaged(folder, read=False)
    else:
        with pytest.raises(UserError, match=message):
            find_checkpoint(tmp_path)


def test_ranks_share_the_files(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 1)
    flip_a_bit(folder / "__1_0.distcp")
    found = [damage(folder, read=True, part=part, parts=4) for part in range(4)]
    assert [bool(what) for what in found].count(True) == 1


def test_a_checkpoint_of_before_there_were_manifests_is_used(
    tmp_path: Path, one_rank: None
) -> None:
    folder = make_checkpoint(tmp_path, 1)
    (folder / "manifest.json").unlink()
    assert newest_valid(tmp_path) == folder


def test_a_checkpoint_of_a_newer_megatron_core_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path, 1)
    (folder / "metadata.json").write_text("{}")
    (folder / "manifest.json").unlink()
    write_manifest(folder, {})
    monkeypatch.setattr(checkpoint_files, "version", lambda _: "0.19.2")
    assert find_checkpoint(tmp_path) == folder
    monkeypatch.setattr(checkpoint_files, "version", lambda _: "0.16.1")
    with pytest.raises(UserError, match=r"written with megatron-core 0\.19 or later; 0\.16\.1"):
        find_checkpoint(tmp_path)
    (folder / "common.pt").write_bytes(b"x")
    (folder / "manifest.json").unlink()
    write_manifest(folder, {})
    assert find_checkpoint(tmp_path) == folder
