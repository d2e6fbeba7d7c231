import gzip
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_prep import cli
from data_prep.documents import BadLines, _lines, read_documents
from data_prep.shards import ShardWriter, read_document, token_dtype
from data_prep.sources import find_sources
from data_prep.train_tokenizer import hash_fraction


def tokenize(source: Path, tokenizer: Path, out: Path, *options: str) -> dict:
    argv = ["tokenize", str(source), "--tokenizer", str(tokenizer), "--output-dir", str(out)]
    assert cli.main([*argv, *options]) == 0
    return json.loads((out / "manifest.json").read_text())


def documents(out: Path, split: str = "train") -> list[list[int]]:
    """As megatron-core reads them."""
    dataset = IndexedDataset(str(out / split))
    return [dataset[i].tolist() for i in range(len(dataset))]


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


def test_plain_text_by_file_paragraph_and_line(tmp_path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one\ntwo\n\n\nthree\n\nfour")

    def read(kind: str) -> list[str]:
        (source,) = find_sources((file,))
        return list(
            read_documents(
                source,
                text_field="text",
                text_documents=kind,
                bad=BadLines(0),
                progress=lambda _: None,
            )
        )

    assert read("file") == ["one\ntwo\n\n\nthree\n\nfour"]
    assert read("paragraph") == ["one\ntwo\n", "three\n", "four\n"]
    assert read("line") == ["one", "two", "", "", "three", "", "four"]


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=6))
@settings(max_examples=200, deadline=None)
def test_lines_do_not_depend_on_chunks(data: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    chunks = [data[a:b] for a, b in itertools.pairwise(edges)]
    expected = data.split(b"\n")
    assert list(_lines(iter(chunks))) == (expected if expected[-1] else expected[:-1])


@given(st.lists(st.lists(st.integers(0, 399), min_size=1, max_size=20), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_what_is_written_is_read(tmp_path_factory, dtype: str, wanted: list[list[int]]) -> None:
    prefix = tmp_path_factory.mktemp("shard") / "train"
    writer = ShardWriter(prefix, dtype)
    for ids in wanted:
        writer.add(ids, len(ids))
    writer.close()
    dataset = IndexedDataset(str(prefix))
    assert [dataset[i].tolist() for i in range(len(dataset))] == wanted
    assert dataset.index.dtype == np.dtype(dtype)
    ours = [read_document(prefix, i, dtype, len(wanted)).tolist() for i in range(len(wanted))]
    assert ours == wanted


def test_ids_take_two_bytes_where_they_fit() -> None:
    assert (token_dtype(65_499), token_dtype(65_500)) == ("uint16", "int32")


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


def hugging_face(path: Path, eod: str = "<|endoftext|>") -> Path:
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=[eod], show_progress=False
    )
    model.train_from_iterator(["def f(x): return x\n"], trainer)
    model.save(str(path))
    return path


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


def test_the_tokenizer_is_the_same_each_time(jsonl, tokenizer, tmp_path) -> None:
    argv = ["train-tokenizer", str(jsonl), "--vocab-size", "340", "--output-dir", str(tmp_path)]
    assert cli.main(argv) == 0
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


def test_a_killed_run_leaves_nothing_and_the_next_one_finishes(jsonl, tokenizer, tmp_path) -> None:
    big = tmp_path / "big.jsonl"
    big.write_bytes(jsonl.read_bytes() * 200)
    out = tmp_path / "data"
    argv = ["tokenize", str(big), "--tokenizer", str(tokenizer), "--output-dir", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "data_prep", *argv])
    deadline = time.monotonic() + 60
    partial = tmp_path / ".data.tmp" / "train.bin"
    while not (partial.is_file() and partial.stat().st_size):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert not out.exists()
    tokenize(big, tokenizer, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.jsonl", "data"]
    assert len(documents(out)) + len(documents(out, "validation")) == 200 * 200


def test_memory_does_not_grow_with_the_input(jsonl, tmp_path) -> None:
    """Documents come out while the file is still being read."""
    big = tmp_path / "big.jsonl"
    big.write_bytes(jsonl.read_bytes() * 300)
    read = []
    (source,) = find_sources((big,))
    texts = read_documents(
        source, text_field="text", text_documents="file", bad=BadLines(0), progress=read.append
    )
    next(texts)
    assert sum(read) < big.stat().st_size / 2


def test_a_link_to_an_empty_folder_and_a_byte_order_mark(tokenizer, tmp_path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    manifest = tokenize(file, tokenizer, tmp_path / "link", "--validation-fraction", "0")
    assert manifest["splits"]["train"]["documents"] == 2
    assert (tmp_path / "real" / "manifest.json").is_file()
