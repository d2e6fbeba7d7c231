"""Index files that a stranger may have put into RUN/dataset_cache: megatron-core 0.16 unpickles some."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from pretrain.config.presets import PRESETS
from pretrain.index import cache
from pretrain.index.files import is_array
from tests.hostile import Command


@pytest.mark.parametrize("content", [None, b"PK\3\4", b""])
def test_what_is_no_array_is_made_again(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_facts", lambda *_: {"seed": 1})
    (tmp_path / "made.json").write_text(json.dumps({"seed": 1}))
    np.save(tmp_path / "a-shuffle_index.npy", np.arange(3))
    assert cache.is_made(tmp_path, PRESETS["debug"](), [])
    hostile = pickle.dumps(Command(tmp_path / "marker")) if content is None else content
    (tmp_path / "a-document_index.npy").write_bytes(hostile)
    assert not cache.is_made(tmp_path, PRESETS["debug"](), [])


@pytest.mark.parametrize("what", ["objects", "cut short", "a header alone"])
def test_arrays_that_cannot_be_mapped_are_none(what: str, tmp_path: Path) -> None:
    file = tmp_path / "a.npy"
    np.save(file, np.array([None] if what == "objects" else [1, 2, 3]))
    if what != "objects":
        file.write_bytes(file.read_bytes()[: 8 if what == "a header alone" else -1])
    assert not is_array(file)
    os.mkfifo(tmp_path / "pipe.npy")
    assert not is_array(tmp_path / "pipe.npy")
    np.save(file, np.zeros(3, [("data_set", "i2"), ("sequence", "i8")]))
    assert is_array(file)


def test_an_array_of_objects_is_not_mapped_into_memory(tmp_path: Path) -> None:
    """It begins as an array does. numpy itself refuses it, as megatron-core maps its index files."""
    marker = tmp_path / "marker"
    np.save(tmp_path / "a.npy", np.array([Command(marker)], dtype=object))
    with pytest.raises(ValueError, match="Python objects in dtype"):
        np.load(tmp_path / "a.npy", allow_pickle=True, mmap_mode="r")
    assert not marker.exists()
