import gzip
import json
from pathlib import Path

import sentencepiece
import tokenizers
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_prep import cli
from data_prep.encode.split import hash_fraction
from data_prep.version import VERSION
from tests.unit.data_prep.conftest import hugging_face


def tokenize(source: Path, tokenizer: Path, out: Path, *options: str) -> dict:
    argv = ["tokenize", str(source), "--tokenizer", str(tokenizer), "--output-dir", str(out)]
    assert cli.main([*argv, *options]) == 0
    return json.loads((out / "manifest.json").read_text())


def documents(out: Path, split: str = "train") -> list[list[int]]:
    """As megatron-core reads them."""
    dataset = IndexedDataset(str(out / split))
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_a_checkout_that_is_not_installed(jsonl, tokenizer, tmp_path, not_installed) -> None:
    manifest = tokenize(jsonl, tokenizer, tmp_path / "data")
    assert manifest["created_by"] == f"megatron-ladder {VERSION}"


def test_megatron_core_reads_the_tokens_the_tokenizer_gives(
    texts, jsonl, tokenizer, tmp_path
) -> None:
    out = tmp_path / "data"
    manifest = tokenize(jsonl, tokenizer, out, "--validation-fraction", "0.2")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    held_out = {t for t in texts if hash_fraction(t) < 0.2}
    for split, wanted in (
        ("train", [t for t in texts if t not in held_out]),
        ("validation", [t for t in texts if t in held_out]),
    ):
        found = documents(out, split)
        assert found == [[*model.encode(t), model.eos_id()] for t in wanted]
        assert [model.decode(ids[:-1]) for ids in found] == wanted  # nothing is lost
        facts = manifest["splits"][split]
        assert facts["documents"] == len(wanted)
        assert facts["tokens"] == sum(map(len, found))
        assert facts["text_bytes"] == sum(len(t.encode()) for t in wanted)
        assert facts["bin_bytes"] == (out / f"{split}.bin").stat().st_size
        assert facts["idx_bytes"] == (out / f"{split}.idx").stat().st_size
    assert (out / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    assert manifest["tokenizer"]["eod_id"] == 2
    assert manifest["dtype"] == "uint16"


def test_every_input_kind_gives_the_same_documents(texts, jsonl, tokenizer, tmp_path) -> None:
    raw = jsonl.read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw[:5000]) + gzip.compress(raw[5000:]))
    packed = zstandard.compress(raw[:5000]) + zstandard.compress(raw[5000:])
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    (tmp_path / "other.jsonl").write_bytes(raw.replace(b'"text"', b'"body"'))
    folder = tmp_path / "files"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03}.py").write_text(text)
    (folder / "skipped.md").write_text("skipped")
    expected = tokenize(jsonl, tokenizer, tmp_path / "plain")["splits"]
    whole = documents(tmp_path / "plain")
    for name, source, options in (
        ("gz", tmp_path / "a.jsonl.gz", ()),
        ("zst", tmp_path / "a.jsonl.zst", ()),
        ("field", tmp_path / "other.jsonl", ("--text-field", "body")),
        ("folder", folder, ("--include", "*.py")),
    ):
        out = tmp_path / name
        assert tokenize(source, tokenizer, out, *options)["splits"] == expected
        assert documents(out) == whole


def test_documents_keep_their_split_when_others_come(texts, jsonl, tokenizer, tmp_path) -> None:
    options = ("--validation-fraction", "0.2", "--test-fraction", "0.2")
    tokenize(jsonl, tokenizer, tmp_path / "all", *options)
    part = tmp_path / "part.jsonl"
    part.write_text("".join(jsonl.read_text().splitlines(True)[::2]))
    tokenize(part, tokenizer, tmp_path / "part", *options)
    splits = ("train", "validation", "test")
    whole = {split: {tuple(d) for d in documents(tmp_path / "all", split)} for split in splits}
    for split in splits:
        assert {tuple(d) for d in documents(tmp_path / "part", split)} <= whole[split]
    assert sum(map(len, whole.values())) == len(texts)  # disjoint


def test_empty_documents_are_left_out(tokenizer, tmp_path, capsys) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": ""}\n\n{"text": "two"}\n')
    manifest = tokenize(file, tokenizer, tmp_path / "data", "--validation-fraction", "0")
    assert manifest["splits"]["train"]["documents"] == 2
    assert "1 empty documents left out" in capsys.readouterr().out


def test_a_hugging_face_tokenizer_serves_too(texts, jsonl, tmp_path) -> None:
    file = hugging_face(tmp_path / "tokenizer.json")
    manifest = tokenize(jsonl, file, tmp_path / "data", "--validation-fraction", "0")
    model = tokenizers.Tokenizer.from_file(str(file))
    eod = model.token_to_id("<|endoftext|>")
    assert manifest["tokenizer"]["kind"] == "huggingface"
    assert manifest["tokenizer"]["eod_id"] == eod
    assert documents(tmp_path / "data") == [[*model.encode(t).ids, eod] for t in texts]


def test_inspect_shows_figures_tokens_and_text(texts, jsonl, tokenizer, tmp_path, capsys) -> None:
    out = tmp_path / "data"
    tokenize(jsonl, tokenizer, out, "--validation-fraction", "0")
    capsys.readouterr()
    assert cli.main(["inspect", str(out), "--document", "3", "--max-tokens", "1000"]) == 0
    shown = capsys.readouterr().out
    assert "200 documents" in shown
    assert texts[3] in shown
    assert "2:'</s>'" in shown
    hf = hugging_face(tmp_path / "tokenizer.json", eod="<|stop|>")
    tokenize(jsonl, hf, tmp_path / "hf", "--validation-fraction", "0", "--eod-token", "<|stop|>")
    assert cli.main(["inspect", str(tmp_path / "hf"), "--document", "-1"]) == 0
    assert "train document 199" in capsys.readouterr().out


def test_a_second_run_does_nothing(jsonl, tokenizer, tmp_path, capsys) -> None:
    out = tmp_path / "data"
    tokenize(jsonl, tokenizer, out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    tokenize(jsonl, tokenizer, out)
    assert "already done" in capsys.readouterr().out
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_a_link_to_an_empty_folder_and_a_byte_order_mark(tokenizer, tmp_path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    manifest = tokenize(file, tokenizer, tmp_path / "link", "--validation-fraction", "0")
    assert manifest["splits"]["train"]["documents"] == 2
    assert (tmp_path / "real" / "manifest.json").is_file()


def test_few_documents_are_all_trained_on(tokenizer, tmp_path, capsys) -> None:
    """Nobody asked for the default fraction; it may even hold out all."""
    file, out = tmp_path / "a.jsonl", tmp_path / "data"
    texts = [f"document {i}" for i in range(300)]
    held_out = next(t for t in texts if hash_fraction(t) < 0.01)
    others = [t for t in texts if hash_fraction(t) >= 0.01][:3]
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    for number, docs in enumerate(([others[0]], [held_out], others)):
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in docs))
        manifest = tokenize(file, tokenizer, out / str(number))
        assert list(manifest["splits"]) == ["train"]
        assert manifest["splits"]["train"]["documents"] == len(docs)
        assert documents(out / str(number)) == [[*model.encode(text), 2] for text in docs]
        assert "validation: none, as there are few documents" in capsys.readouterr().out
        assert cli.main(["verify", str(out / str(number))]) == 0
        tokenize(file, tokenizer, out / str(number))
        assert "already done" in capsys.readouterr().out
    # With one to train on, the other is held out.
    docs = [others[0], held_out]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in docs))
    manifest = tokenize(file, tokenizer, out / "both")
    assert {name: s["documents"] for name, s in manifest["splits"].items()} == {
        "train": 1,
        "validation": 1,
    }
    assert "validation: none" not in capsys.readouterr().out
