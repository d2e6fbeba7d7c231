"""`data tokenize --min-tokens`: which documents are left out, and what is said of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep import cli
from data_prep.encode.part_files import PartFiles
from data_prep.encode.split import Fractions
from tests.unit.data_prep.dataset.test_tokenize import documents, tokenize


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_long_documents_are_those_of_the_whole_data_set(
    workers: str, jsonl: Path, tokenizer: Path, tmp_path: Path, capsys
) -> None:
    options = ("--validation-fraction", "0.3", "--workers", workers)
    tokenize(jsonl, tokenizer, tmp_path / "all", *options)
    whole = {split: documents(tmp_path / "all", split) for split in ("train", "validation")}
    lengths = [len(ids) for some in whole.values() for ids in some]
    least = sorted(lengths)[len(lengths) // 2]
    capsys.readouterr()
    given = (*options, "--min-tokens", str(least))
    manifest = tokenize(jsonl, tokenizer, tmp_path / "long", *given)
    for split, some in whole.items():  # in their order, and in their splits
        wanted = [ids for ids in some if len(ids) >= least]
        assert documents(tmp_path / "long", split) == wanted
        assert manifest["splits"][split]["documents"] == len(wanted)
    short = [length for length in lengths if length < least]
    assert 20 < len(short) < 180
    assert least in lengths  # so that one is exactly as long
    assert manifest["options"]["min_tokens"] == least
    assert manifest["too_short"] == {"documents": len(short), "tokens": sum(short)}
    said = f"{len(short)} documents shorter than --min-tokens left out, {sum(short):,} tokens"
    assert said in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "long")]) == 0
    tokenize(jsonl, tokenizer, tmp_path / "long", *given)
    assert "already done" in capsys.readouterr().out


def test_a_data_set_of_all_documents_has_no_such_fields(
    jsonl, tokenizer, tmp_path, refused
) -> None:
    manifest = tokenize(jsonl, tokenizer, tmp_path / "all")
    assert "too_short" not in manifest
    assert "min_tokens" not in manifest["options"]  # so that older data sets stay the same ones
    argv = ["tokenize", jsonl, "--tokenizer", tokenizer, "--output-dir"]
    assert "holds something else" in refused(*argv, tmp_path / "all", "--min-tokens", 9)
    assert "must be 1 or more" in refused(*argv, tmp_path / "new", "--min-tokens", 0)
    said = refused(*argv, tmp_path / "new", "--min-tokens", 100_000)
    assert "200 documents shorter than --min-tokens left out" in said
    assert not (tmp_path / "new").exists()


def test_eod_and_bos_count_and_masks_go_with_their_documents(tmp_path: Path) -> None:
    texts = ["a", "", "two", "b", "one"]
    ids = np.array([5, 9, 6, 7, 8, 3, 4], np.uint32)  # the third begins with 9, the BOS
    lengths, trained = np.array([1, 0, 3, 1, 2]), np.array([0, 1, 0, 1, 1, 0, 1], bool)
    with PartFiles(str(tmp_path / "x"), "uint16", 2, Fractions(0, 0), 9, min_tokens=4) as files:
        found = files.add_conversations(texts, ids, trained, lengths, np.ones(5, bool))
        splits = files.close()
    assert found == (2, 8)
    assert files.empty == 1
    assert files.too_short == {"documents": 2, "tokens": 6}
    assert np.fromfile(tmp_path / "x.train.bin", "<u2").tolist() == [9, 6, 7, 2, 9, 3, 4, 2]
    assert np.fromfile(tmp_path / "x.train.mask", "u1").tolist() == [1, 0, 1, 1, 0, 0, 1, 1]
    assert splits["train"]["text_bytes"] == len("two" + "one")
    assert json.loads(json.dumps(files.too_short)) == files.too_short  # no numpy numbers
