"""`data blend`: weights that mean what is asked for, in a file that `train` reads."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import cli
from data_prep.dataset.blend import Blend, _weights

COUNTS = st.lists(st.integers(1, 10**13), min_size=1, max_size=8)


def weights(tokens: list[int], **options) -> list[float]:
    return _weights(Blend((), Path("x.json"), **options), tokens)


@given(COUNTS, st.floats(0.1, 100))
def test_weights_add_up_and_keep_the_order(tokens: list[int], temperature: float) -> None:
    found = weights(tokens, temperature=temperature)
    assert sum(found) == pytest.approx(1)
    for i, a in enumerate(tokens):
        assert all(found[i] >= found[j] for j, b in enumerate(tokens) if a > b)


@given(COUNTS)
def test_temperature_1_is_in_proportion_and_a_high_one_is_even(tokens: list[int]) -> None:
    shares = [t / sum(tokens) for t in tokens]
    assert weights(tokens) == pytest.approx(shares)
    assert weights(tokens, temperature=1.0) == pytest.approx(shares)
    assert weights(tokens, temperature=1e9) == pytest.approx(
        [1 / len(tokens)] * len(tokens), rel=1e-6
    )


@given(COUNTS)
def test_equal_epochs_are_in_proportion(tokens: list[int]) -> None:
    found = weights(tokens, epochs=(2.5,) * len(tokens))
    assert found == pytest.approx([t / sum(tokens) for t in tokens])


@pytest.fixture(scope="module")
def sets(jsonl: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two with the same tokenizer, one with another."""
    folder = tmp_path_factory.mktemp("blend")
    half = folder / "half.jsonl"
    half.write_text("".join(jsonl.read_text().splitlines(keepends=True)[:80]))
    other = folder / "other"
    argv = ["train-tokenizer", half, "--vocab-size", "330", "--output-dir", other]
    assert cli.main([str(a) for a in argv]) == 0
    made = []
    for name, text, model in (
        ("a", jsonl, tokenizer),
        ("b", half, tokenizer),
        ("c", half, other / "tokenizer.model"),
    ):
        made.append(folder / name)
        argv = ["tokenize", text, "--tokenizer", model, "--output-dir", made[-1]]
        assert cli.main([str(a) for a in argv] + ["--validation-fraction", "0"]) == 0
    return made


def train_tokens(folder: Path) -> int:
    return json.loads((folder / "manifest.json").read_text())["splits"]["train"]["tokens"]


def test_the_file_is_what_train_reads(sets: list[Path], tmp_path: Path, capsys) -> None:
    from pretrain.start.arguments import parse_train

    file = tmp_path / "blend.json"
    argv = ["blend", *sets[:2], "--epochs", "1", "3", "--output", file]
    assert cli.main([str(a) for a in argv]) == 0
    a, b = map(train_tokens, sets[:2])
    printed = capsys.readouterr().out
    assert f"--schedule.train-tokens {a + 3 * b}" in printed
    argv = ["--preset", "debug", "--config", file, "--data.seq-length", "64"]
    config, _ = parse_train([str(x) for x in argv])
    assert list(config.data.paths) == [path.resolve() for path in sets[:2]]
    assert config.data.weights == pytest.approx((a / (a + 3 * b), 3 * b / (a + 3 * b)))
    assert config.data.seq_length == 64
    assert config.model.num_layers == parse_train(["--preset", "debug"])[0].model.num_layers


def test_what_it_means_is_shown(sets: list[Path], tmp_path: Path, capsys) -> None:
    file = tmp_path / "blend.json"
    argv = ["blend", *sets[:2], "--weights", "1", "1", "--output", file, "--train-tokens", 1000]
    assert cli.main([str(a) for a in argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [
        str(sets[0]),
        f"{train_tokens(sets[0]):,}",
        "0.5000",
        "500",
        f"{500 / train_tokens(sets[0]):.2f}",
    ]


def test_weights_that_change_later(sets: list[Path], tmp_path: Path, capsys) -> None:
    """In one file, as `train` reads them; the tables add up to the whole training."""
    from pretrain.config.data import Phase
    from pretrain.start.arguments import parse_train

    file = tmp_path / "blend.json"
    argv = ["blend", *sets[:2], "--weights", 1, 0, "--output", file, "--train-tokens", 5000]
    argv += ["--then", 1000, 3, 1, 4000, 0, 5]
    assert cli.main([str(a) for a in argv]) == 0
    config, _ = parse_train(["--preset", "debug", "--config", str(file)])
    assert config.data.weights == (1.0, 0.0)
    assert config.data.phases == (Phase(1000, (0.75, 0.25)), Phase(4000, (0.0, 1.0)))
    lines = capsys.readouterr().out.splitlines()
    taken = [
        int(line.split()[3].replace(",", "")) for line in lines if line.startswith(str(sets[0]))
    ]
    assert taken == [1000, 2250, 0]
    assert "from 4,000 tokens on" in lines


def test_bad_input(sets: list[Path], tmp_path: Path, refused) -> None:
    file = tmp_path / "blend.json"

    def said(*argv: object) -> str:
        return refused("blend", *argv, "--output", file)

    assert "different tokenizers" in said(sets[0], sets[2])
    assert "given twice" in said(sets[0], sets[0])
    assert "is not a data set" in said(sets[0], tmp_path)
    assert "3 values for 2" in said(*sets[:2], "--epochs", 1, 2, 3)
    assert "above 0" in said(*sets[:2], "--weights", 1, 0)
    assert "above 0" in said(*sets[:2], "--temperature", "nan")
    assert "they come to inf tokens" in said(*sets[:2], "--epochs", 1e308, 1e308)
    assert "they come to" in said(*sets[:2], "--epochs", 1e-320, 1e-320)
    assert "one of them" in said(*sets[:2], "--temperature", 2, "--epochs", 1, 2)
    assert "leave out --train-tokens" in said(*sets[:2], "--epochs", 1, 2, "--train-tokens", 9)
    then = (*sets[:2], "--weights", 1, 1, "--then")
    assert "3 values for each change" in said(*then, 100, 1)
    assert "a whole number of tokens above 100" in said(*then, 100, 1, 1, 100, 1, 1)
    assert "all 0" in said(*then, 100, 0, 0)
    assert "give a whole number of tokens" in said(*then, 1.5, 1, 1)
    assert "0 or more" in said(*then, 100, 1, "nan")
    assert "not before the end" in said(*then, 100, 1, 1, "--train-tokens", 100)
    assert "above 0" in said(*sets[:2], "--weights", 0, 0, "--then", 100, 1, 1)
    assert "give --weights" in said(*sets[:2], "--epochs", 1, 1, "--then", 100, 1, 1)
    assert not file.exists()
    file.write_text("mine")
    assert "exists" in said(*sets[:2])
    assert file.read_text() == "mine"


def test_a_file_of_some_fields_needs_a_preset(tmp_path: Path) -> None:
    from megatron_ladder.errors import UserError
    from pretrain.start.arguments import parse_train

    file = tmp_path / "some.json"
    file.write_text(json.dumps({"data": {"weights": None}}))
    with pytest.raises(UserError, match="give --preset NAME as well"):
        parse_train(["--config", str(file)])
    file.write_text(json.dumps({"data": {"wieghts": None}}))
    with pytest.raises(UserError, match="unknown field wieghts"):
        parse_train(["--preset", "debug", "--config", str(file)])
