"""Files whose names are not UTF-8, and systems whose encoding is another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import UserError
from data_prep.read.documents import read_documents
from data_prep.read.reading import BadLines, Reading
from data_prep.read.sources import find_sources

ODD = os.fsdecode(b"caf\xe9.jsonl")
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
UTF8 = {"LC_ALL": "C.UTF-8"}


def run(*argv: object, **environment: str) -> str:
    command = [sys.executable, "-m", "data_prep", *map(os.fspath, map(str, argv))]
    done = subprocess.run(
        command,
        capture_output=True,
        env={**os.environ, "COLUMNS": "200", **environment},
        timeout=60,
    )
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "in"
    place.mkdir()
    texts = ["hello world, naïve 日本語", "x", "hello again"]
    lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in (*texts, texts[0]))
    try:
        (place / ODD).write_text("{broken\n" + lines, encoding="utf-8")
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    return place


@pytest.mark.parametrize("environment", [UTF8, ASCII], ids=["utf-8", "ascii"])
def test_they_are_cleaned_tokenized_and_named(
    folder: Path, tokenizer: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    cleaned, out = tmp_path / "clean", tmp_path / "out"
    rules = ["--exact-dedup", "--min-characters", 3]
    said = run("clean", folder, "--output-dir", cleaned, *rules, **environment)
    assert r"caf\udce9.jsonl:1: not JSON" in said
    dropped = [
        json.loads(line)
        for line in (cleaned / "clean-dropped.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [one["source"] for one in dropped] == [rf"{folder}/caf\udce9.jsonl#{n}" for n in (2, 4)]
    assert dropped[1]["repeats"] == rf"{folder}/caf\udce9.jsonl#1"
    assert dropped[1]["text"] == "hello world, naïve 日本語"
    argv = ["--tokenizer", tokenizer, "--output-dir", out, "--engine", "reference"]
    said = run("tokenize", folder, *argv, **environment)
    assert r"caf\udce9.jsonl:1: not JSON" in said
    assert "already done" in run("tokenize", folder, *argv, **environment)
    assert run("verify", out, **environment).startswith("OK: 4 documents")


def test_what_a_row_may_have_is_counted_in_bytes(tmp_path: Path) -> None:
    texts = ["日" * 10, "x" * 30, "x" * 31, "日" * 11]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    (source,) = find_sources((tmp_path / "a.parquet",))
    bad = BadLines(2)
    found = list(read_documents(source, Reading(max_document_bytes=30), bad, lambda _: None))
    assert found == texts[:2] and bad.count == 2
    with pytest.raises(UserError, match="row 4: longer than --max-document-bytes 30"):
        list(read_documents(source, Reading(max_document_bytes=30), BadLines(1), lambda _: None))
