"""`megatron-ladder index`: training finds what it has made."""

import json
from pathlib import Path

import pytest

from pretrain import cli
from pretrain.index.cache import is_made
from pretrain.run.folder import lock
from pretrain.start.arguments import parse_train
from pretrain.start.preflight import preflight
from tests.data_sets import write_data_set


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    sets = [str(write_data_set(tmp_path / name, seed=i)) for i, name in enumerate("ab")]
    paths = ["--data.paths", *sets, "--data.weights", "1", "2"]
    return ["--preset", "debug", *paths, "--output-dir", str(tmp_path / "run")]


def run(*argv: str, status: int = 0) -> None:
    assert cli.main(["index", *argv]) == status


def test_training_finds_them(options: list[str], tmp_path: Path, capsys) -> None:
    run(*options)
    assert f"Index files: {tmp_path}/run/dataset_cache, made in " in capsys.readouterr().out
    # As the training will look for them; the layout does not matter.
    config, folders, plan = preflight(parse_train(options)[0], world_size=2)
    assert plan == f"New run in {tmp_path}/run"
    assert is_made(tmp_path / "run/dataset_cache", config, folders)
    run(*options, "--parallel.tensor-model-parallel-size", "2")
    assert "already made for this configuration" in capsys.readouterr().out
    # Of other sequences there are none yet.
    run(*options, "--seed", "7")
    assert "made in" in capsys.readouterr().out


def test_tasks_and_a_last_one(options: list[str], tmp_path: Path, capsys) -> None:
    cache = tmp_path / "run/dataset_cache"
    held = lock(tmp_path / "run")  # by whoever: a task does not train
    for rank in ("0", "1", "2"):
        run(*options, "--rank", rank, "--world-size=3")
        assert f"The share of task {rank} of 3 is made" in capsys.readouterr().out
    held.close()
    assert len(list(cache.glob("*description.txt"))) == 5 and not (cache / "made.json").exists()
    before = {file.name: file.stat().st_mtime_ns for file in cache.iterdir()}
    run(*options)
    assert json.loads((cache / "made.json").read_text())["seq_length"]
    assert all((cache / name).stat().st_mtime_ns == time for name, time in before.items())


def test_mistakes_are_said(options: list[str], tmp_path: Path, capsys) -> None:
    for more, message in {
        ("--rank", "1"): "give both --rank and --world-size",
        ("--rank", "2", "--world-size", "2"): "--rank 2 is not one of --world-size 2",
        ("--rank", "x", "--world-size", "2"): "--rank x: give a number",
        ("--nproc-per-node", "8"): "--nproc-per-node is of `train`",
        ("--data.weights", "1"): "data.weights has 1 values",
        ("--output-dir", str(tmp_path)): "is not empty and holds no run",
    }.items():
        run(*options, *more, status=2)
        assert message in capsys.readouterr().err, more
    run(*options[:-2], status=2)
    assert "no --output-dir" in capsys.readouterr().err
    held = lock(tmp_path / "run")
    run(*options, status=2)
    held.close()
    assert "is training in this folder" in capsys.readouterr().err


def test_help_names_the_options(capsys) -> None:
    run("--help")
    assert "--world-size" in capsys.readouterr().out
