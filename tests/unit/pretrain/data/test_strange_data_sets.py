"""A data set from a stranger: its manifest names no other files, its index says where its tokens are."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ladder.errors import UserError
from pretrain.data import folders
from pretrain.data.folders import keep_facts, kept_facts, open_folder, unigram_loss
from tests.data_sets import write_data_set


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data_set(tmp_path / "data")


def change(data: Path, act: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    act(manifest)
    (data / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "name", ["../../config.json", "/etc/passwd", "..", "tokenizer.json", "\ud800", 5]
)
def test_a_manifest_names_its_own_tokenizer_only(name, data: Path, tmp_path: Path) -> None:
    """With `../../config.json`, training overwrote the run's configuration."""
    (tmp_path / "config.json").write_text("something else")
    change(data, lambda m: m["tokenizer"].update(file=name))
    with pytest.raises(UserError, match=r"tokenizer\.file is .*: it must be tokenizer\.model"):
        open_folder(data)
    kept = tmp_path / "run" / "data" / "0"
    kept.mkdir(parents=True)
    (kept / "manifest.json").write_bytes((data / "manifest.json").read_bytes())
    with pytest.raises(UserError, match=r"tokenizer\.file is"):
        kept_facts(tmp_path / "run")


def test_the_tokenizer_is_the_one_that_the_manifest_means(data: Path) -> None:
    (data / "tokenizer.model").write_bytes(b"another one")
    with pytest.raises(UserError, match="is not the tokenizer that the data set was made with"):
        open_folder(data)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        (("splits", "train", "documents"), 1 << 40, "are not the index of the manifest's"),
        (("splits", "train", "documents"), 1 << 63, "documents is 9223372036854775808"),
        (("splits", "train", "tokens"), float("nan"), "tokens is nan"),
        (("splits", "train", "tokens"), True, "tokens is True"),
        (("splits", "../../train"), {}, "a split is '../../train'"),
        (("splits",), [1], r"splits is \[1\]"),
        (("tokenizer", "vocab_size"), "200", "vocab_size is '200'"),
        (("tokenizer", "vocab_size"), 1 << 40, "vocab_size is 1099511627776"),
        (("tokenizer", "eod_id"), -1, "eod_id is -1"),
        (("dtype",), {}, "dtype is {}"),
    ],
)
def test_impossible_values_are_refused(field, value, said: str, data: Path) -> None:
    def act(manifest: dict[str, Any]) -> None:
        for key in field[:-1]:
            manifest = manifest[key]
        manifest[field[-1]] = value

    change(data, act)
    with pytest.raises(UserError, match=said):
        open_folder(data)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "too many levels"),
        (b'{"a":' * 150 + b"1" + b"}" * 150, "more than 100 levels"),
        ("{}".encode("utf-16"), "it is UTF-16: save it as UTF-8"),
        (b'{"a": "\xff"}', r"not UTF-8 \(byte 7\)"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"a": ' + b"1" * 5000 + b"}", "digits"),
        (b"[]", "must hold one JSON object"),
        (b" " * 3000, "has more than 2,000 bytes"),
    ],
)
def test_text_that_is_no_manifest(content, said: str, data: Path, monkeypatch) -> None:
    monkeypatch.setattr(folders, "MOST_BYTES", 2000 if content.isspace() else 1 << 20)
    (data / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=said):
        open_folder(data)


DOCUMENTS = 60  # of the train split


def edit(data: Path, table: str, number: int, value: int, *, checksum: bool = False) -> None:
    kind, start = {
        "length": ("<i4", 34),
        "offset": ("<i8", 34 + 4 * DOCUMENTS),
        "place": ("<i8", 34 + 12 * DOCUMENTS),
        "count": ("<u8", 18),
    }[table]
    index = data / "train.idx"
    raw = bytearray(index.read_bytes())
    width = np.dtype(kind).itemsize
    raw[start + width * number : start + width * (number + 1)] = np.array([value], kind).tobytes()
    index.write_bytes(raw)
    if not checksum:  # the manifest goes with the wrong index
        digest = hashlib.sha256(raw).hexdigest()
        change(data, lambda m: m["splits"]["train"].update(idx_sha256=digest))


@pytest.mark.parametrize(
    ("table", "number", "value", "said"),
    [
        ("offset", 3, 0, "the offset of document 3 is wrong"),
        ("offset", 3, -128, "the offset of document 3 is wrong"),
        ("offset", 59, 1 << 40, "the offset of document 59 is wrong"),
        ("length", 0, 0, "the length of document 0 is wrong"),
        ("length", 0, -64, "the length of document 0 is wrong"),
        ("length", 7, 65, "describes 3,841 tokens"),
        ("place", 60, 61, "the place of document 60 is wrong"),
        ("count", 0, 1 << 40, "is not the index of 60 documents"),
        ("count", 1, 60, "is not the index of 60 documents"),
    ],
)
def test_an_index_that_points_elsewhere(table, number, value, said: str, data: Path) -> None:
    edit(data, table, number, value)
    with pytest.raises(UserError, match=said):
        open_folder(data)


@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
def test_an_index_is_compared_with_its_checksum(data: Path, at_once: int, monkeypatch) -> None:
    """Documents 0 and 1 get other lengths, and what follows from them: only the checksum can tell."""
    monkeypatch.setattr("pretrain.data.index_file.DOCUMENTS_AT_ONCE", at_once)
    open_folder(data)
    edit(data, "length", 0, 60, checksum=True)
    edit(data, "length", 1, 68, checksum=True)
    edit(data, "offset", 1, 120, checksum=True)
    with pytest.raises(UserError, match="its SHA-256 is not the manifest's"):
        open_folder(data)
    change(data, lambda m: m["splits"]["train"].pop("idx_sha256"))  # of an old data set
    open_folder(data)


def test_the_first_rank_alone_reads_the_files(data: Path, monkeypatch) -> None:
    edit(data, "offset", 3, 0)
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1234")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "1")
    open_folder(data)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="offset of document 3"):
        open_folder(data)


def test_ids_beyond_the_vocabulary_are_named(data: Path) -> None:
    tokens = np.memmap(data / "validation.bin", "<u2", "r+")
    tokens[5] = 60_000
    tokens.flush()
    with pytest.raises(UserError, match="ids that are not in the vocabulary of 200"):
        unigram_loss(open_folder(data))


def test_facts_are_written_into_the_runs_folder(data: Path, tmp_path: Path) -> None:
    keep_facts(tmp_path / "run", [open_folder(data)])
    found = sorted(p.relative_to(tmp_path).as_posix() for p in (tmp_path / "run").rglob("*.*"))
    assert found == ["run/data/0/manifest.json", "run/data/0/tokenizer.model"]
    (tmp_path / "run" / "data" / "0x").mkdir()
    (tmp_path / "run" / "data" / "0x" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="0x is no folder of a run"):
        kept_facts(tmp_path / "run")


def test_a_link_is_not_written_through(data: Path, tmp_path: Path) -> None:
    """A stranger's run may have a link where a file is made: what it points to stays as it is."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run" / "data" / "0").mkdir(parents=True)
    (tmp_path / "run" / "data" / "0" / "tokenizer.model.tmp").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic"):
        keep_facts(tmp_path / "run", [open_folder(data)])
    assert (tmp_path / "mine").read_text() == "mine"
