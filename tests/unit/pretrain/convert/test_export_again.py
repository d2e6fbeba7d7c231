"""An export that is there already, and damage that an export must not pass on."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_ladder.errors import UserError
from pretrain.cli import main
from pretrain.convert.plain_model import load_plain_model
from pretrain.run.checkpoint_files import damage
from tests.unit.hf import foreign

SHARDS = ("--max-shard-size", "20KB")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, RUN, and its exports, MODEL and SHARDS."""
    folder = tmp_path_factory.mktemp("again")
    foreign.save(foreign.make("qwen3, untied"), folder / "published")
    assert main(["import", str(folder / "published"), str(folder / "run")]) == 0
    assert main(["export", str(folder / "run"), str(folder / "model")]) == 0
    assert main(["export", str(folder / "run"), str(folder / "shards"), *SHARDS]) == 0
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "again"))


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def flip_a_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("name", "options"), [("model", ()), ("shards", SHARDS)])
def test_it_is_done(folder: Path, capsys, name: str, options: tuple[str, ...]) -> None:
    before = files(folder / name)
    assert main(["export", str(folder / "run"), str(folder / name), *options]) == 0
    assert "step_00000000: nothing to do" in capsys.readouterr().err
    assert files(folder / name) == before
    assert sorted(p.name for p in folder.iterdir()) == ["model", "published", "run", "shards"]
    (folder / name / ".cache").mkdir()  # of the hub's client
    assert main(["export", str(folder / "run"), str(folder / name), *options]) == 0


def test_an_upload_that_failed_is_made_up_for(folder: Path, monkeypatch) -> None:
    pushed = []
    monkeypatch.setattr(
        "pretrain.convert.push.push_folder", lambda *a, **_: pushed.append(a) or "address"
    )
    again = ["export", str(folder / "run"), str(folder / "model"), "--push", "me/model"]
    assert main(again) == 0
    assert pushed == [(folder / "model", "me/model")]


def cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def other_end(model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 3}))


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (
            lambda m: flip_a_bit(m / "model.safetensors", -7),
            (),
            "model.safetensors holds something",
        ),
        (cut, (), "model.safetensors holds something else"),
        (lambda m: (m / "tokenizer.json").unlink(), (), "tokenizer.json is missing"),
        (lambda m: (m / "model-1.safetensors").write_bytes(b""), (), "is not part of it"),
        (other_end, (), "config.json holds something else"),
        (lambda m: None, ("--dtype", "bf16"), "model.safetensors holds something else"),
        (lambda m: None, SHARDS, "safetensors is missing"),
        (lambda m: None, ("--license", "mit"), "README.md holds something else"),
    ],
)
def test_another_model_is_refused(folder: Path, capsys, change, options, said: str) -> None:
    model = folder / "model"
    change(model)
    before = files(model)
    assert main(["export", str(folder / "run"), str(model), *options]) == 2
    error = capsys.readouterr().err
    assert f"{model} is not empty and not the export of {folder}/run/checkpoints" in error
    assert said in error
    assert files(model) == before


def test_the_export_of_another_checkpoint_is_refused(folder: Path, capsys) -> None:
    foreign.save(foreign.make("qwen3, tied"), folder / "other")
    assert main(["import", str(folder / "other"), str(folder / "other run")]) == 0
    assert main(["export", str(folder / "other run"), str(folder / "model")]) == 2
    assert "is not empty and not the export of" in capsys.readouterr().err


def test_a_flipped_bit_in_an_import_is_not_exported(folder: Path, capsys) -> None:
    """Each file that holds weights, and the index that says where."""
    checkpoint = folder / "run" / "checkpoints" / "step_00000000"
    assert not damage(checkpoint, read=True)
    listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert set(listed) == {p.name for p in checkpoint.iterdir()} - {"manifest.json"}
    for name in ("__0_0.distcp", "__0_5.distcp", ".metadata"):
        whole = (checkpoint / name).read_bytes()
        flip_a_bit(checkpoint / name, len(whole) // 2)
        assert main(["export", str(folder / "run"), str(folder / "new")]) == 2
        said = capsys.readouterr().err
        assert (
            f"{name} is not what was written: its SHA-256 differs. Import the model again" in said
        )
        with pytest.raises(UserError, match="SHA-256 differs"):
            load_plain_model(folder / "run")
        (checkpoint / name).write_bytes(whole)
    tokenizer = folder / "run" / "imported" / "tokenizer.json"
    flip_a_bit(tokenizer, 100)
    assert main(["export", str(folder / "run"), str(folder / "new")]) == 2
    assert f"{tokenizer} is damaged: its SHA-256 is not that in" in capsys.readouterr().err
    flip_a_bit(tokenizer, 100)
    assert not (folder / "new").exists()
    assert main(["export", str(folder / "run"), str(folder / "new")]) == 0


def test_all_chat_templates_are_kept(folder: Path, capsys) -> None:
    """transformers has the default one in chat_template.jinja, others by name in a folder."""
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer = AutoTokenizer.from_pretrained(folder / "published")
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(folder / "published")
    assert (folder / "published" / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert main(["import", str(folder / "published"), str(folder / "chat")]) == 0
    assert main(["export", str(folder / "chat"), str(folder / "exported")]) == 0
    assert AutoTokenizer.from_pretrained(folder / "exported").chat_template == templates
    assert main(["import", str(folder / "published"), str(folder / "chat")]) == 0
    assert main(["export", str(folder / "chat"), str(folder / "exported")]) == 0
    other = folder / "exported" / "additional_chat_templates" / "other.jinja"
    other.write_text("")
    assert main(["export", str(folder / "chat"), str(folder / "exported")]) == 2
    assert f"{other} is not part of it" in capsys.readouterr().err


def test_an_end_id_in_the_generation_config_alone(folder: Path) -> None:
    """Older folders have -1 for none in config.json."""
    path = folder / "published" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": -1}))
    (folder / "published" / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert main(["import", str(folder / "published"), str(folder / "ends")]) == 0
    assert main(["export", str(folder / "ends"), str(folder / "exported")]) == 0
    assert load_plain_model(folder / "exported").text.end_ids == (2, 5)
    assert json.loads((folder / "exported" / "config.json").read_text())["eos_token_id"] == [2, 5]
