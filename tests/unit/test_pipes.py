"""A pipe in a stranger's folder makes no command wait for ever. The three packages share no code."""

import json
import os
from pathlib import Path

import pytest

import data_prep.json_files
import megatron_ladder.json_files
import slurm.files
from megatron_ladder.errors import UserError
from pretrain.convert.model_text import load_tokenizer
from slurm.jobs.folders import log_files


def test_no_reader_opens_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "tokenizer.json"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="not a regular file"):
        megatron_ladder.json_files.read_json(pipe, "a status")
    with pytest.raises(data_prep.json_files.UserError, match="not a regular file"):
        data_prep.json_files.read_json(pipe, "a manifest")
    with pytest.raises(slurm.files.UserError, match="a pipe"):
        slurm.files.read_json(pipe)
    with pytest.raises(UserError, match="not a regular file"):
        load_tokenizer(pipe)


def test_a_user_may_give_one(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    os.write(theirs, json.dumps({"data": {}}).encode())
    os.close(theirs)
    assert megatron_ladder.json_files.read_json(Path(f"/dev/fd/{ours}"), "a blend") == {"data": {}}
    os.close(ours)


def test_logs_are_files_with_numbers_of_tasks(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    for name in ("log.7", "log.10", "log.\u00b2", "log.x"):
        (tmp_path / name).touch()
    assert [file.name for file in log_files(tmp_path)] == ["log.7", "log.10"]
