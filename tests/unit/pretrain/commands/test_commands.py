"""What users see of a mistake: a line or two on stderr, exit status 2, nothing lost."""

from pathlib import Path

import pytest

from pretrain import cli
from pretrain.config.train import save_config
from pretrain.start.arguments import parse_train
from pretrain.start.preflight import preflight
from tests.data_sets import write_data_set


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data_set(tmp_path / "data")


def refused(argv: list[str], capsys) -> str:
    """The command's complaint."""
    try:
        status = cli.main(argv)
    except SystemExit as ended:
        status = ended.code
    output = capsys.readouterr()
    assert status == 2, output
    assert "Traceback" not in output.err
    assert len(output.err.strip().splitlines()) <= 20
    return " ".join((output.out + output.err).replace("│", " ").split())


def test_train_says_what_is_wrong(data: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    start = ["train", "--preset", "debug", "--output-dir", str(run)]
    good = [*start, "--data.paths", str(data)]
    for argv, message in {
        (*start,): "no data: give --data.paths",
        (*start, "--data.paths", str(tmp_path / "no")): "does not exist",
        ("train", "--preset", "debug", "--data.paths", str(data)): "no --output-dir",
        (*good, "--nproc-per-node", "3", "--parallel.tensor-model-parallel-size", "2"): (
            "3 ranks do not divide into TP 2 x PP 1 x CP 1 = 2"
        ),
        (
            *good,
            "--parallel.tensor-model-parallel-size",
            "4",
        ): "num_query_groups 2 is not divisible",
        (*good, "--nproc-per-node", "3"): "global_batch_size 8 is not a multiple",
        (*good, "--model.vocab-size", "100"): "vocabulary of 200 ids",
        (*good, "--transformer-impl", "transformer_engine"): "see `megatron-ladder doctor`",
        (*good, "--data.path", "x"): "--data.paths",
        (*good, "--nproc-per-node", "0"): "--nproc-per-node 0",
    }.items():
        assert message in refused(list(argv), capsys), argv
        assert not run.exists(), argv


def test_a_run_with_another_configuration_is_kept(data: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    argv = ["--preset", "debug", "--output-dir", str(run), "--data.paths", str(data)]
    config, _, _ = preflight(parse_train(argv)[0], world_size=1)
    run.mkdir()
    save_config(config, run / "config.json")
    before = (run / "config.json").read_bytes()
    message = refused(["train", *argv, "--seed", "5"], capsys)
    assert "holds another run: seed: 1234 -> 5 (the order of the data comes from it)" in message
    assert (run / "config.json").read_bytes() == before
    assert [p.name for p in run.iterdir()] == ["config.json"]


def test_errors_of_the_system_are_a_line(data, tmp_path, capsys, monkeypatch) -> None:
    """Of a training they are a crash, which whoever launched it starts again: no user's mistake."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "run"))

    monkeypatch.setattr("pretrain.loop.train.train", full)
    run = ["--output-dir", str(tmp_path / "run"), "--data.paths", str(data)]
    assert cli.main(["train", "--preset", "debug", *run]) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "megatron-ladder" in x]
    assert line == f"megatron-ladder train: {tmp_path / 'run'}: No space left on device"


def test_other_commands_say_what_is_wrong(tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    for argv, message in {
        ("trian",): "no command 'trian': did you mean train?",
        ("export", str(tmp_path / "no"), str(tmp_path / "out")): "does not exist",
        ("export", str(tmp_path / "empty"), str(tmp_path / "out")): "has no checkpoint",
        ("export", "a"): "the folder to make",
        ("export", "a", "b", "--max-shard-size", "big"): "give a size such as 500mb",
        ("generate", str(tmp_path / "no"), "--prompt", "x"): "no",
        ("report", str(tmp_path / "empty")): "empty",
    }.items():
        assert message in refused(list(argv), capsys).lower()


def test_help_lists_the_commands(capsys) -> None:
    assert cli.main([]) == 0
    output = capsys.readouterr().out
    assert {"train", "export", "status"} < set(cli.COMMANDS)
    for name in cli.COMMANDS:
        assert f"  {name} " in output
        assert callable(cli._command(name))
