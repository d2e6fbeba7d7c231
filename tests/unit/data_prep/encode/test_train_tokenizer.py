"""Training of a tokenizer: the same file each time, and nothing half done."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import sentencepiece
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_prep import cli
from data_prep.encode.split import hash_fraction
from data_prep.encode.train_tokenizer import Sample, _known_share
from data_prep.read.sources import find_sources


def test_the_tokenizer_is_the_same_each_time(jsonl, tokenizer, tmp_path) -> None:
    argv = ["train-tokenizer", str(jsonl), "--vocab-size", "340", "--output-dir", str(tmp_path)]
    assert cli.main(argv) == 0
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


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


def test_what_of_the_input_is_not_used_is_said(jsonl: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(jsonl.read_bytes() + b"{broken\n")
    (tmp_path / "in" / "b.7z").write_bytes(b"x")
    argv = ["train-tokenizer", str(tmp_path / "in"), "--vocab-size", "340", "--output-dir"]
    assert cli.main([*argv, str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert "1 lines or files skipped; the first ones:\n" in told
    assert f"{tmp_path}/in/a.jsonl:201: not JSON" in told
    assert "1 files of the input folders not read (0.0 MB): *.7z (1)" in told
    (tmp_path / "in" / "a.jsonl").write_bytes(b"{broken\n" * 3)
    assert cli.main([*argv, str(tmp_path / "none")]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path}/in/a.jsonl:1: not JSON" in told and "no document was sampled" in told


@given(st.lists(st.text("aé", max_size=12), max_size=40), st.integers(0, 60))
def test_the_sample_keeps_the_limit_and_is_even(texts: list[str], limit: int) -> None:
    sample = Sample(limit)
    for text in texts:
        sample.add(text)
        assert sum(len(raw) for *_, raw in sample._held) <= limit  # at any time
    found = list(sample.texts())
    # Worked out at the end, of all texts: by hash, until the next one does not fit.
    fitting = [t for t in texts if 0 < len(t.encode()) <= limit]
    wanted: set[str] = set()
    for text in sorted(set(fitting), key=hash_fraction):
        if sum(len(t.encode()) for t in fitting if t in wanted or t == text) > limit:
            break
        wanted.add(text)
    assert found == [t for t in fitting if t in wanted]


def test_of_plain_files_the_share_is_known(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("a" * 100)
    plain = find_sources((tmp_path,))
    assert _known_share(plain, 250) == 0.25
    assert _known_share(plain, 2000) == 1.0
    assert _known_share([*plain, replace(plain[0], compression="gzip")], 250) == 1.0
    assert _known_share([*plain, replace(plain[0], kind="parquet")], 250) == 1.0


def test_max_training_bytes_is_a_limit(tmp_path: Path, monkeypatch) -> None:
    """Also of a file that was packed 100 times smaller, of which no size is known before."""
    texts = [f"{i} " + "word " * 500 for i in range(400)]
    (tmp_path / "a.jsonl.zst").write_bytes(
        zstandard.compress("".join(json.dumps({"text": t}) + "\n" for t in texts).encode())
    )
    seen: list[str] = []

    def train(sentence_iterator, model_writer, **_: object) -> None:
        seen.extend(sentence_iterator)
        model_writer.write(b"model")

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "Train", train)
    argv = ["train-tokenizer", str(tmp_path / "a.jsonl.zst"), "--vocab-size", "340"]
    argv += ["--output-dir", str(tmp_path / "out"), "--max-training-bytes", "100000"]
    assert cli.main(argv) == 0
    assert 90_000 < sum(map(len, seen)) <= 100_000
