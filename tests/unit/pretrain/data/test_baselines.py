"""The entropy of single tokens is counted once for each validation split, in a process."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.config.presets import PRESETS
from pretrain.data import baselines
from pretrain.data.baselines import Baselines
from pretrain.data.folders import open_folder, unigram_loss
from tests.data_sets import write_data_set


def test_a_split_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = replace(PRESETS["debug"](), output_dir=run)
    folders = [open_folder(write_data_set(tmp_path / name, seed=i)) for i, name in enumerate("ab")]
    folders.append(open_folder(write_data_set(tmp_path / "c", validation_documents=0)))
    expected = [(name, unigram_loss(folder)) for name, folder in zip("ab", folders, strict=False)]
    assert Baselines(config, folders).arrived(wait=True) == expected

    def never(_: object) -> float:
        raise AssertionError("counted again")

    monkeypatch.setattr(baselines, "unigram_loss", never)  # also of the process, which is forked
    again = Baselines(config, folders)
    assert again.arrived(wait=True) == expected
    assert again.arrived(wait=True) == [] == again.arrived()
    # Not the names count but what is in the split; a damaged cache is none.
    (run / "data" / "unigram_losses.json").write_text("[1]")
    assert Baselines(config, folders).arrived(wait=True) == []


def test_what_is_no_cache_is_counted_again(tmp_path: Path) -> None:
    file = tmp_path / "unigram_losses.json"
    for content in ("[" * 300_000, '{"a": "b"}', "[1]", '{"a": 1' + "0" * 400 + "}"):
        file.write_text(content)
        assert baselines._known(file) == {}
    file.unlink()
    os.mkfifo(file)
    assert baselines._known(file) == {}


def test_other_ranks_count_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "is_first_rank", lambda: False)
    config = replace(PRESETS["debug"](), output_dir=tmp_path)
    folder = open_folder(write_data_set(tmp_path / "data"))
    assert Baselines(config, [folder]).arrived(wait=True) == []
