import gzip
import hashlib
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
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
from data_prep.dataset.shards import read_document, token_dtype, write_index
from data_prep.encode.split import hash_fraction
from data_prep.read.documents import read_documents
from data_prep.read.lines import line_blocks
from data_prep.read.reading import BadLines, Reading
from data_prep.read.sources import find_sources
from data_prep.version import VERSION


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


def test_plain_text_by_file_paragraph_and_line(tmp_path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one\ntwo\n\n\nthree\n\nfour")

    def read(kind: str) -> list[str]:
        (source,) = find_sources((file,))
        reading = Reading(text_documents=kind)
        return list(read_documents(source, reading, BadLines(0), lambda _: None))

    assert read("file") == ["one\ntwo\n\n\nthree\n\nfour"]
    assert read("paragraph") == ["one\ntwo\n", "three\n", "four\n"]
    assert read("line") == ["one", "two", "", "", "three", "", "four"]


def chunks(data: bytes, cuts: list[int], begin: int, end: int) -> Iterator[tuple[bytes, bool]]:
    """The bytes from `begin` on in chunks, those behind `end` not owned."""
    edges = sorted({begin, end, len(data), *(c for c in cuts if begin < c < len(data))})
    return ((data[a:b], a < end) for a, b in itertools.pairwise(edges))


@given(
    st.text("ab\n", max_size=60).map(str.encode),
    st.lists(st.integers(0, 60), max_size=6),
    st.lists(st.integers(1, 59), max_size=4, unique=True),
    st.integers(1, 8),
    st.integers(1, 20),
)
@settings(max_examples=500, deadline=None)
def test_every_line_is_in_one_range_however_the_file_is_cut(
    data: bytes, cuts: list[int], ranges: list[int], longest: int, block_bytes: int
) -> None:
    expected: list[bytes | None] = list(data.split(b"\n"))
    expected = [x if len(x) <= longest else None for x in expected[: None if expected[-1] else -1]]
    edges = [0, *sorted(r for r in ranges if r < len(data)), len(data)]
    found: list[bytes | None] = []
    for begin, end in itertools.pairwise(edges):
        pieces = chunks(data, cuts, begin, end)
        number = 1
        for first, lines in line_blocks(
            pieces, inside=begin > 0, longest=longest, block_bytes=block_bytes
        ):
            assert first == number
            number += len(lines)
            found += lines
    assert found == expected


@given(st.lists(st.lists(st.integers(0, 399), min_size=1, max_size=20), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_what_is_written_is_read(tmp_path_factory, dtype: str, wanted: list[list[int]]) -> None:
    prefix = tmp_path_factory.mktemp("shard") / "train"
    files = [prefix.with_name(f"{i}.len") for i in range(3)]
    for i, file in enumerate(files):  # lengths come in several files
        np.array([len(ids) for ids in wanted[i * 5 : i * 5 + 5 if i < 2 else None]], "<i4").tofile(
            file
        )
    np.concatenate(wanted).astype(dtype).tofile(prefix.with_suffix(".bin"))
    digest = write_index(prefix.with_suffix(".idx"), dtype, files)
    assert digest == hashlib.sha256(prefix.with_suffix(".idx").read_bytes()).hexdigest()
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


def test_a_link_to_an_empty_folder_and_a_byte_order_mark(tokenizer, tmp_path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    manifest = tokenize(file, tokenizer, tmp_path / "link", "--validation-fraction", "0")
    assert manifest["splits"]["train"]["documents"] == 2
    assert (tmp_path / "real" / "manifest.json").is_file()


def test_special_tokens_are_no_text(jsonl: Path, tmp_path: Path, refused) -> None:

    argv = ["train-tokenizer", str(jsonl), "--vocab-size", "340", "--output-dir", str(tmp_path)]
    names = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"]
    assert cli.main([*argv, "--special-tokens", *names]) == 0
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert [model.PieceToId(name) for name in names] == [3, 4, 5]
    assert not {3, 4, 5} & set(model.EncodeAsIds("a <fim_prefix> b"))
    again = [*argv[:-1], str(tmp_path / "again"), "--special-tokens"]
    for wrong in (["<s>"], ["<a>", "<a>"], ["a b"]):
        assert "--special-tokens" in refused(*again, *wrong)


def test_ctrl_c_ends_training_of_a_tokenizer(jsonl: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=4_000_000))
    words = (letters[i : i + 12] for i in range(0, len(letters), 12))
    text.write_text("".join(json.dumps({"text": w}) + "\n" for w in words))
    argv = [sys.executable, "-m", "data_prep", "train-tokenizer", text, "--vocab-size", "60000"]
    process = subprocess.Popen(
        [*map(str, argv), "--output-dir", str(tmp_path / "out")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(2.5)
    assert process.poll() is None, "it ended before it was interrupted"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) != 0
    assert not list((tmp_path / "out").glob("*"))
