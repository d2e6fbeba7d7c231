"""An import that is there already."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.cli import main
from pretrain.run.checkpoint_files import write_manifest
from tests.unit.hf import foreign

NAME = "qwen2, tied"


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("once")
    foreign.save(foreign.make(NAME), folder / "model")
    assert main(["import", str(folder / "model"), str(folder / "run")]) == 0
    return folder


@pytest.fixture
def folder(once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(once, tmp_path / "again"))


def again(folder: Path, *options: str) -> int:
    return main(["import", str(folder / "model"), str(folder / "run"), *options])


def test_it_is_done(folder: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert again(folder) == 0
    assert "run is the import of" in capsys.readouterr().out
    monkeypatch.chdir(folder)
    assert main(["import", "model", "run"]) == 0
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def another_model(folder: Path) -> None:
    """Of the same shapes; one number differs."""
    model = foreign.make(NAME)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 5] += 1e-3
    foreign.save(model, folder / "model")


def another_dtype(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    save_file({name: t.half() for name, t in load_file(path).items()}, path)


def another_tokenizer(folder: Path) -> None:
    foreign.write_tokenizer(folder / "model", foreign.VOCAB - 1)


def a_damaged_checkpoint(folder: Path) -> None:
    path = folder / "run" / "checkpoints" / "step_00000000" / "__0_3.distcp"
    path.write_bytes(path.read_bytes()[:-1])


def another_checkpoint(folder: Path) -> None:
    """Whole, by its own manifest."""
    assert main(["import", str(folder / "model"), str(folder / "other")]) == 0
    shutil.rmtree(folder / "other")
    checkpoint = folder / "run" / "checkpoints" / "step_00000000"
    first, second = (checkpoint / f"__0_{i}.distcp" for i in (2, 3))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, {})


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (another_model, (), "decoder.layers.mlp.linear_fc1.weight differs"),
        (another_dtype, (), "has another shape or dtype"),
        (another_tokenizer, (), "data/0/manifest.json holds something else"),
        (a_damaged_checkpoint, (), "step_00000000 is damaged"),
        (another_checkpoint, (), "differs"),
        (lambda _: None, ("--ladder-layers", "last:2"), "model.ladder_layers, model.residual"),
        (lambda f: shutil.rmtree(f / "run" / "checkpoints"), (), "manifest.json is missing"),
    ],
)
def test_others_are_refused(folder: Path, capsys, change, options, said: str) -> None:
    change(folder)
    assert again(folder, *options) == 2
    error = capsys.readouterr().err
    assert f"{folder}/run is not empty and not the import of {folder}/model" in error
    assert said in error
