"""`data tokenize --add-bos`: the same documents, each with BOS before it, and no second one."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from data_prep import cli
from data_prep.dataset import verify
from data_prep.encode.part_files import PartFiles
from data_prep.encode.split import Fractions
from data_prep.errors import UserError
from tests.chat_models import BOS, tokenizer_json, write_tokenizer
from tests.unit.data_prep.conftest import hugging_face


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "llama", tokenizer_json())
    return tmp_path / "llama" / "tokenizer.json"


def tokenized(source: Path, tokenizer: Path, folder: Path, *options: object) -> Path:
    argv = ["tokenize", source, "--tokenizer", tokenizer, "--output-dir", folder, *options]
    assert cli.main([str(word) for word in argv]) == 0
    return folder


def documents(data: Path) -> list[np.ndarray]:
    """Of the train split, with their BOS and EOD."""
    facts = json.loads((data / "manifest.json").read_text())
    eod = facts["tokenizer"]["eod_id"]
    ids = np.fromfile(data / "train.bin", np.dtype(facts["dtype"]))
    ends = np.flatnonzero(ids == eod) + 1
    return np.split(ids, ends[:-1])


def facts(data: Path) -> dict:
    return json.loads((data / "manifest.json").read_text())["tokenizer"]


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface", "named"])
def test_every_document_begins_with_it(
    kind: str, jsonl: Path, tokenizer: Path, llama: Path, tmp_path: Path
) -> None:
    file = tokenizer if kind == "sentencepiece" else llama
    if kind == "named":  # by tokenizer_config.json; the post-processor adds none
        tokenizer_json(begins=False).save(str(llama))
    plain = tokenized(jsonl, file, tmp_path / "plain")
    begun = tokenized(jsonl, file, tmp_path / "begun", "--add-bos")
    assert "bos_id" not in facts(plain)
    bos = facts(begun).pop("bos_id")
    assert bos == (1 if kind == "sentencepiece" else tokenizer_json().token_to_id(BOS))
    assert facts(begun) == facts(plain) | {"bos_id": bos}
    for before, now in zip(documents(plain), documents(begun), strict=True):
        assert now.tolist() == [bos, *before]
    assert cli.main(["verify", str(begun)]) == 0
    if kind == "huggingface":  # transformers' own ids
        texts = [json.loads(line)["text"] for line in jsonl.read_text().splitlines()]
        own = AutoTokenizer.from_pretrained(llama.parent)
        theirs = {tuple(own.encode(text)) for text in texts}
        assert all(tuple(ids[:-1]) in theirs for ids in documents(begun))


def test_verify_misses_none(jsonl: Path, llama: Path, tmp_path: Path) -> None:
    data = tokenized(jsonl, llama, tmp_path / "data", "--add-bos")
    for number in (0, 7):
        start = sum(map(len, documents(data)[:number]))
        ids = np.memmap(data / "train.bin", np.uint16, "r+")
        ids[start] = 5
        ids.flush()
        with pytest.raises(UserError, match=r"1 documents of bytes 0 to .* do not begin with BOS"):
            verify.verify(verify.Verify(data, workers=1))
        ids[start] = facts(data)["bos_id"]
        ids.flush()
    verify.verify(verify.Verify(data, workers=1))


def test_a_template_that_writes_it_is_not_given_another(llama: Path, tmp_path: Path) -> None:
    talks = tmp_path / "talks.jsonl"
    talk = [{"role": "user", "content": "quick"}, {"role": "assistant", "content": "brown fox"}]
    talks.write_text((json.dumps({"messages": talk}) + "\n") * 40)
    options = ("--chat-field", "messages", "--validation-fraction", "0")
    plain = tokenized(talks, llama, tmp_path / "plain", *options)
    begun = tokenized(talks, llama, tmp_path / "begun", *options, "--add-bos")
    for ending in ("bin", "idx", "mask"):
        assert (plain / f"train.{ending}").read_bytes() == (begun / f"train.{ending}").read_bytes()


def test_it_is_not_trained_on_in_conversations(tmp_path: Path) -> None:
    texts, ids = (
        ["a", "", "bc", "d"],
        np.array([5, 9, 6, 7, 8], np.uint32),
    )  # the third begins with 9
    lengths, trained = np.array([1, 0, 3, 1]), np.ones(5, bool)
    with PartFiles(str(tmp_path / "x"), "uint16", 2, Fractions(0, 0), bos_id=9) as files:
        found = files.add_conversations(texts, ids, trained, lengths, np.ones(4, bool))
        assert found == (3, 10)
        files.close()
    assert np.fromfile(tmp_path / "x.train.bin", "<u2").tolist() == [9, 5, 2, 9, 6, 7, 2, 9, 8, 2]
    assert np.fromfile(tmp_path / "x.train.mask", "u1").tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 1, 1]
    assert np.fromfile(tmp_path / "x.train.len", "<i4").tolist() == [3, 4, 3]


def test_a_tokenizer_without_one(jsonl: Path, tmp_path: Path, refused) -> None:
    file = hugging_face(tmp_path / "tokenizer.json")
    argv = ["tokenize", jsonl, "--tokenizer", file, "--output-dir", tmp_path / "out"]
    assert "has no BOS token" in refused(*argv, "--add-bos")
    assert not (tmp_path / "out").exists()


def test_data_sets_with_and_without_are_not_blended(
    jsonl: Path, llama: Path, tmp_path: Path, refused
) -> None:
    plain = tokenized(jsonl, llama, tmp_path / "plain")
    begun = tokenized(jsonl, llama, tmp_path / "begun", "--add-bos")
    for sets in ((plain, begun), (begun, plain)):
        said = refused("blend", *sets, "--output", tmp_path / "blend.json")
        assert f"documents of {begun} begin with a BOS token" in said


def test_inspect_shows_it(jsonl: Path, llama: Path, tmp_path: Path, capsys) -> None:
    data = tokenized(jsonl, llama, tmp_path / "data", "--add-bos")
    capsys.readouterr()
    assert cli.main(["inspect", str(data), "--document", "0"]) == 0
    said = capsys.readouterr().out
    bos = facts(data)["bos_id"]
    assert f"documents begin with BOS {bos}" in said and f"{bos}:'{BOS}'" in said
    assert BOS not in said.rsplit("\n\n", 1)[1]
