"""Counts for which the format's, or megatron-core's, 32 bits are too few are refused."""

import re
from pathlib import Path

import numpy as np
import pytest

from data_prep import cli
from data_prep.dataset import merge
from data_prep.encode import part_files
from data_prep.encode.part_files import PartFiles
from data_prep.encode.split import Fractions
from data_prep.errors import UserError


def test_the_bounds_are_those_of_32_bits() -> None:
    """What megatron-core does with one document more: numpy's own int32."""
    assert np.iinfo(np.int32).max == merge.MOST_DOCUMENTS == part_files.MOST_TOKENS
    most = np.array([merge.MOST_DOCUMENTS, merge.MOST_DOCUMENTS + 1])
    assert most.astype(np.int32).tolist() == [2**31 - 1, -(2**31)]


@pytest.mark.parametrize("as_a_job_array", [False, True])
def test_too_many_documents(
    as_a_job_array: bool, jsonl, tokenizer, tmp_path, refused, monkeypatch
) -> None:
    monkeypatch.setattr(merge, "MOST_DOCUMENTS", 20)
    data = tmp_path / "data"
    given = ["tokenize", jsonl, "--tokenizer", tokenizer, "--output-dir", data]
    given = [str(word) for word in given]
    words = r"the train split would have (\d+) documents, megatron-core numbers at most 20 of a"
    if as_a_job_array:
        assert cli.main([*given, "--rank", "0"]) == 0
        said = refused("merge", data)
    else:
        said = refused(*given)
    found = re.search(words, said)
    assert found, said
    sets = -(-int(found[1]) // 20)
    assert (
        f"Make {sets} data sets or more: run `megatron-ladder data tokenize` once for each" in said
    )
    assert not data.exists()
    monkeypatch.setattr(merge, "MOST_DOCUMENTS", int(found[1]))
    assert cli.main(["merge", str(data)]) == 0  # as many as allowed; the parts were kept
    assert (data / "manifest.json").is_file()


def test_a_document_of_too_many_tokens(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(part_files, "MOST_TOKENS", 9)

    def add(tokens: int) -> None:
        with PartFiles(str(tmp_path / "part"), "uint16", 2, Fractions(0, 0)) as files:
            ids = np.arange(tokens, dtype=np.uint32)
            files.add(["text"], ids, np.array([tokens]))

    add(8)  # and the EOD
    with pytest.raises(
        UserError, match="a document has 10 tokens, a data set holds at most 9 of each"
    ):
        add(9)
