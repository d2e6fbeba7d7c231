"""What prompts of a run, and of the folder made of it, begin with: what its training data began with."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_ladder.errors import UserError
from megatron_ladder.hf.tokenizer import write_tokenizer
from pretrain import cli
from pretrain.config.data import DataConfig
from pretrain.config.presets import PRESETS
from pretrain.config.train import save_config
from pretrain.convert.model_text import text_of_run
from pretrain.data.checks import open_data
from pretrain.data.fim import FillInTheMiddle
from pretrain.data.folders import DataFolder, keep_facts, kept_facts, open_folder
from pretrain.data.sample import check_tokenizer
from pretrain.evaluation.documents import Texts, open_split
from pretrain.inference.server.chat import chat_renderer
from pretrain.start import initial
from pretrain.start.going_on.past import same_data
from pretrain.start.initial import check_initial, initial_model
from tests import chat_models
from tests.data_sets import write_data_set
from tests.unit.hf.tiny import train_sentencepiece

TEXT = "the quick brown fox <|eot_id|> "


def data_set(folder: Path, tokenizer: Path, bos_id: int | None, eod_id: int) -> DataFolder:
    """As `data tokenize` would make it, but for its tokens."""
    made = write_data_set(folder, tokenizer=tokenizer.read_bytes())
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["tokenizer"] |= {"eod_id": eod_id, "file": tokenizer.name, "vocab_size": 400}
    manifest["tokenizer"]["kind"] = (
        "huggingface" if tokenizer.suffix == ".json" else "sentencepiece"
    )
    if bos_id is not None:
        manifest["tokenizer"]["bos_id"] = bos_id
    (made / "tokenizer.model").rename(made / tokenizer.name)
    (made / "manifest.json").write_text(json.dumps(manifest))
    return open_folder(made)


def tokenizer_file(kind: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    if kind == "sentencepiece":
        return train_sentencepiece(folder, "bpe")
    chat_models.tokenizer_json(begins=kind == "begins").save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("kind", ["sentencepiece", "begins", "plain"])
@pytest.mark.parametrize("with_bos", [False, True])
def test_a_run_and_its_export_begin_texts_as_training_did(
    kind: str, with_bos: bool, tmp_path: Path
) -> None:
    """Whatever the tokenizer's own file adds: a tokenizer.json of Llama's puts BOS before every text."""
    file = tokenizer_file(kind, tmp_path / "tokenizer")
    bos_id, eod_id = (1, 2) if kind == "sentencepiece" else (300, 301)
    began = [bos_id] if with_bos else []
    data = data_set(tmp_path / "data", file, bos_id if with_bos else None, eod_id)
    keep_facts(tmp_path / "run", [data])
    text = text_of_run(tmp_path / "run", kept_facts(tmp_path / "run")[0])
    assert text.begin_ids == began and text.end_ids == (eod_id,)
    alone = text.tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert text.tokenizer.encode(TEXT).ids == [*began, *alone]

    folder = tmp_path / "exported"
    folder.mkdir()
    write_tokenizer(
        *(file, folder),
        eos_token_id=eod_id,
        vocab_size=600,
        max_length=64,
        begins_with=bos_id if with_bos else None,
    )
    exported = AutoTokenizer.from_pretrained(folder)
    plain = "the quick brown fox"
    alone = text.tokenizer.encode(plain, add_special_tokens=False).ids
    assert exported.encode(plain) == [*began, *alone]
    assert exported.encode(plain, add_special_tokens=False) == alone
    if with_bos:
        assert exported.bos_token_id == bos_id
    if kind == ("begins" if with_bos else "plain"):  # untouched
        assert (folder / "tokenizer.json").read_bytes() == file.read_bytes()
    # Data that the run was made of fit the folder, whatever its tokenizer adds.
    check_tokenizer(data, folder / "tokenizer.json", folder)
    other = tokenizer_file("begins", tmp_path / "other")
    other.write_text(other.read_text().replace("eot_id", "eox_id"))
    with pytest.raises(UserError, match="was tokenized with another tokenizer"):
        check_tokenizer(data, other, tmp_path / "other")


def test_a_run_of_weights_that_came_without_a_tokenizer(tmp_path: Path) -> None:
    """Its tokenizer is the data's, and so is what texts begin with, as `export` writes it."""
    file = tokenizer_file("begins", tmp_path / "tokenizer")
    data = data_set(tmp_path / "data", file, None, 301)
    keep_facts(tmp_path / "run", [data])
    imported = tmp_path / "run" / "imported"
    chat_models.write_tokenizer(imported, chat_models.tokenizer_json())  # with a chat template
    (imported / "tokenizer.json").unlink()
    (imported / "config.json").write_text('{"model_type": "llama", "eos_token_id": [301, 304]}')
    text = text_of_run(tmp_path / "run", kept_facts(tmp_path / "run")[0])
    assert text.begin_ids == [] and text.end_ids == (301, 304)
    assert text.tokenizer.decode(text.prompt_ids(chat_models.PROMPT)) == chat_models.PROMPT
    with pytest.raises(UserError, match="no chat template"):
        asyncio.run(chat_renderer(imported)([], {}))


def test_data_with_and_without_do_not_mix(tmp_path: Path) -> None:
    file = tokenizer_file("begins", tmp_path / "tokenizer")
    plain, begun = (
        data_set(tmp_path / name, file, bos, 301) for name, bos in (("plain", None), ("begun", 300))
    )
    config = replace(
        PRESETS["debug"](),
        data=DataConfig(paths=(plain.path, begun.path), seq_length=64),
        output_dir=tmp_path / "run",
    )
    with pytest.raises(UserError, match=r"begun begin with a BOS token, those of .*plain do not"):
        open_data(config)
    keep_facts(tmp_path / "run", [plain])
    begun_with = replace(config, data=DataConfig(paths=(plain.path,), seq_length=64))
    save_config(begun_with, tmp_path / "run/config.json")
    same_data(tmp_path / "run", [plain])
    with pytest.raises(UserError, match="started with documents without a BOS token"):
        same_data(tmp_path / "run", [begun])


def test_texts_of_documents_have_no_bos(tmp_path: Path) -> None:
    file = tokenizer_file("begins", tmp_path / "tokenizer")
    begun = data_set(tmp_path / "begun", file, 300, 301)
    ids = np.memmap(begun.path / "validation.bin", np.uint16, "r+")
    ids[0], ids[1:9] = 300, np.arange(40, 48)
    ids.flush()
    expected = chat_models.tokenizer_json().decode(ids[1:63].tolist(), skip_special_tokens=False)
    assert Texts(open_split(begun, "validation"))[0] == expected


def test_fill_in_the_middle_leaves_it_first() -> None:
    from types import SimpleNamespace

    from pretrain.data.sequences import Sequences

    fim = FillInTheMiddle(rate=1.0, spm_rate=0.5, prefix=-1, middle=-2, suffix=-3)
    text = np.array([300, *range(10, 30), 301])
    own = SimpleNamespace(
        config=SimpleNamespace(fim=fim, bos_id=300, random_seed=1, names={"a/train": "a"}),
        dataset=SimpleNamespace(path_prefix="a/train", sequence_lengths=[22]),
    )
    for idx in range(8):
        (changed,) = Sequences._filled_in(own, idx, [text], [(0, 0, 22)])  # type: ignore[arg-type]
        assert changed[0] == 300 and changed[-1] == 301
        assert sorted(changed) == sorted([*text, -1, -2, -3])
        (middle,) = Sequences._filled_in(own, idx, [text[5:15]], [(0, 5, 10)])  # type: ignore[arg-type]
        assert middle[0] < 0


def test_training_warns_of_texts_that_begin_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An imported model whose tokenizer puts BOS before a text, and data without it."""
    model = chat_models.write_chat_model(tmp_path / "model")
    assert cli.main(["import", str(model), str(tmp_path / "base")]) == 0
    theirs = initial_model(tmp_path / "base")
    config = replace(PRESETS["debug"](), model=theirs, init_from=tmp_path / "base")
    file = model / "tokenizer.json"
    plain, begun = (
        data_set(tmp_path / name, file, bos, 301) for name, bos in (("plain", None), ("begun", 300))
    )
    said: list[str] = []
    monkeypatch.setattr(initial.logger, "warning", lambda text, *of: said.append(text % of))
    check_initial(config, [begun])
    assert not said
    check_initial(config, [plain])
    assert "begin with the token 300" in said[0] and said[0].endswith("with --add-bos")
