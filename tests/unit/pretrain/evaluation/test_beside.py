"""Mistakes that are found before a training whose checkpoints are to be measured beside it."""

import shlex
from pathlib import Path

import pytest

from megatron_ladder.errors import UserError
from pretrain.data.checks import open_data
from pretrain.evaluation import beside
from pretrain.start.arguments import parse_train
from tests.data_sets import write_data_set

DESYNC = "--model.residual desync --parallel.tensor-model-parallel-size 2 "


@pytest.fixture
def asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks of lm-evaluation-harness that are looked up; data sets are made here."""
    monkeypatch.chdir(tmp_path)
    write_data_set(tmp_path / "data")
    write_data_set(tmp_path / "other", tokenizer=b"another tokenizer")
    write_data_set(tmp_path / "training", validation_documents=0)
    found: list[str] = []
    monkeypatch.setattr(beside, "find_tasks", lambda names, _: found.extend(names))
    return found


def check(options: str, data: str = "data") -> None:
    words = ["--preset", "debug", "--output-dir", "run", "--data.paths", data]
    config, _ = parse_train([*words, *shlex.split(options)])
    beside.check_watch(config, open_data(config))


def test_what_fits_is_accepted(asked_for: list[str]) -> None:
    check("--watch.tasks last_word perplexity arc_easy")
    check("--watch.tasks last_word --watch.data other")  # made of text: any tokenizer
    check("--watch.tasks hellaswag", data="training")
    check("--watch.export-interval 10", data="training")
    assert asked_for == ["arc_easy", "hellaswag"]


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        (
            "--watch.tasks last_word",
            "training",
            "none of the run's data sets has a validation split",
        ),
        (
            "--watch.tasks perplexity --watch.data other",
            "data",
            "was tokenized with another tokenizer",
        ),
        (
            "--watch.tasks needle --watch.data training",
            "data",
            "has nothing in its validation split",
        ),
        ("--watch.tasks refine", "data", "has no loss mask"),
        ("--watch.tasks refine --watch.data other", "data", "another tokenizer"),
        ("--watch.tasks last_word --watch.data a/b c/b", "data", "several folders are named b"),
        ("--watch.tasks last_word --watch.data none", "data", "none"),
        (DESYNC + "--watch.tasks last_word", "data", "weights work only on that many ranks"),
        (DESYNC + "--watch.export-interval 10", "data", "weights work only on that many ranks"),
    ],
)
def test_refusals(options: str, data: str, message: str, asked_for: list[str]) -> None:
    with pytest.raises(UserError, match=message):
        check(options, data)
