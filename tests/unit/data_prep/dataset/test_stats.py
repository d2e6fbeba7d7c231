"""`data stats`: its figures are those of the tokens; its picture is there."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep import cli
from data_prep.dataset import stats
from data_prep.dataset.folder import open_data_set


@pytest.fixture(scope="module")
def data(jsonl: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stats") / "data"
    argv = ["tokenize", jsonl, "--tokenizer", tokenizer, "--output-dir", folder]
    assert cli.main([str(a) for a in argv] + ["--validation-fraction", "0.2"]) == 0
    return folder


def test_figures(data: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "TOKENS_AT_ONCE", 100)
    picture, figures = tmp_path / "s.png", tmp_path / "s.json"
    argv = ["stats", data, "--output", picture, "--json", figures]
    assert cli.main([str(a) for a in argv]) == 0
    tokens = np.fromfile(data / "train.bin", "<u2")
    facts = json.loads((data / "manifest.json").read_text())["splits"]["train"]
    lengths = np.fromfile(data / "train.idx", "<i4", facts["documents"], offset=34)
    found = json.loads(figures.read_text())
    assert found["documents"] == len(lengths) == sum(found["documents_by_length"])
    assert found["tokens"] == len(tokens) == sum(found["tokens_by_length"])
    assert found["bytes_per_token"] == facts["text_bytes"] / len(tokens)
    assert found["longest"] == lengths.max()
    assert found["percentiles"]["50"] == np.percentile(lengths, 50, method="lower")
    assert found["used"] == len(np.unique(tokens))
    shares = np.bincount(tokens) / len(tokens)
    shares = shares[shares > 0]
    assert found["entropy"] == pytest.approx(-(shares * np.log(shares)).sum())
    best = found["top_tokens"][0]
    assert best["id"] == np.bincount(tokens).argmax()
    assert best["share"] == pytest.approx(shares.max())
    for low, high, count, weight in zip(
        found["edges"],
        found["edges"][1:],
        found["documents_by_length"],
        found["tokens_by_length"],
        strict=False,
    ):
        inside = (lengths >= low) & (lengths < high)
        assert (count, weight) == (inside.sum(), lengths[inside].sum())
    printed = capsys.readouterr().out
    assert repr(best["piece"]) in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("longest", [1, 2, 3, 4, 5, 6, 7, 1000, 2**20, 2**20 - 1])
def test_every_length_is_in_the_histogram(longest: int) -> None:
    edges = stats.length_edges(longest)
    assert edges[0] == 1
    assert edges[-2] <= longest < edges[-1]
    assert (np.diff(edges) > 0).all()


def test_bad_input(data: Path, tmp_path: Path, refused) -> None:
    assert "has no test split" in refused("stats", data, "--split", "test")
    assert "is a .png" in refused("stats", data, "--output", tmp_path / "x.pdf")
    assert "does not exist" in refused("stats", data, "--output", tmp_path / "no" / "x.png")
    assert "is not a data set" in refused("stats", tmp_path)


def test_pieces_that_the_picture_cannot_show() -> None:
    assert stats._drawn("\u2581the") == "\u00b7the"
    assert stats._drawn("日") == "\\u65e5"
    assert stats._drawn("$x$\n") == "\\$x\\$\\n"
    assert stats._drawn(" " * 40).endswith("(40)")


def test_opening_reads_the_manifest_alone(data: Path) -> None:
    assert open_data_set(data).lengths("train").sum() == len(np.fromfile(data / "train.bin", "<u2"))
