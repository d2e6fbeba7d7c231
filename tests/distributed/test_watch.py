"""Runs whose checkpoints are measured and exported beside them, and faults in the middle of that."""

import json
import signal
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM

from pretrain.cli import main
from pretrain.evaluation.results import results_by_step
from pretrain.run.folder import checkpoint_at, checkpoint_step, checkpoints
from pretrain.run.status import read_status
from tests.beside import StandIn, wait_for
from tests.data_sets import write_data_set
from tests.distributed.disturbed import assert_same
from tests.distributed.test_training import (
    STEPS,
    TIMEOUT_S,
    command,
    metrics,
    tensor_parallel,
    train,
)
from tests.runs import run_train
from tests.unit.hf import tiny
from tests.unit.pretrain.evaluation import eval_models

WATCH = ("--watch.tasks", "toy", "--watch.interval", "5", "--watch.export-interval", "10")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("data") / "data", vocab_size=400)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setattr(
        "pretrain.evaluation.beside.check_watch", lambda *_: None
    )  # no task is named toy
    return StandIn(tmp_path / "stand_in", monkeypatch)


def lines(run: Path) -> set[tuple[str, int]]:
    kinds = ("evaluation", "export", "watch_failed", "watch_left_out")
    return {(kind, line["step"]) for kind in kinds for line in metrics(run, kind)}


def test_whatever_happens_the_training_is_the_same(
    data: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    """The process beside a run is killed, then the run itself while the process works. Then the run is told
    to stop while it waits for its last measurement, which fails in the end."""
    run, plain = tmp_path / "run", tmp_path / "plain"
    options = tensor_parallel(2)
    train(data, plain, *options)
    argv = command(data, run, *options, *WATCH)[4:]

    # The process of step 5 is killed and started again. That of step 10 goes on when the run is killed.
    stand_in.tell("5.go", "5.dies")
    codes, output = run_train(
        argv,
        tmp_path / "log",
        TIMEOUT_S,
        kill_when=lambda: ("eval", 10) in stand_in.done() and checkpoint_at(run, 15).is_dir(),
    )
    assert set(codes) == {-signal.SIGKILL}, output
    assert stand_in.done() == [("eval", 5), ("eval", 5), ("eval", 10)]
    beside_it = stand_in.last()[0]
    wait_for(lambda: not psutil.pid_exists(beside_it))
    assert list(results_by_step(run)) == [5]

    kept: list[int] = []

    def stopped() -> bool:
        if not kept and (read_status(run) or {})["state"] == "measuring":
            kept.extend(checkpoint_step(path) for path in checkpoints(run))
            first_rank = psutil.Process(stand_in.last()[0]).parent()
            assert first_rank is not None
            first_rank.send_signal(signal.SIGTERM)
        return False

    codes, output = run_train(argv, tmp_path / "log", TIMEOUT_S, kill_when=stopped)
    assert codes == [75, 75], output
    assert kept == [10, 15, STEPS]  # --keep-last is 2, and 10 is still needed
    assert metrics(run, "end")[-1]["reason"] == "signal SIGTERM"

    stand_in.tell("go", f"{STEPS}.fails")
    output = train(data, run, *options, *WATCH)
    assert f"step {STEPS} was saved, without its evaluation and export" in output
    assert "no network" in output
    assert metrics(run, "end")[-1]["reason"] == "finished"
    assert_same(run, plain)
    assert lines(run) == {
        ("evaluation", 5),
        ("evaluation", 10),
        ("export", 10),
        ("watch_left_out", 15),
        ("evaluation", STEPS),  # of the tasks that did not fail
        ("watch_failed", STEPS),
    }
    assert set(results_by_step(run)) == {5, 10, STEPS}
    assert {path.suffix for path in (run / "watch").iterdir()} == {".log"}
    assert [checkpoint_step(path) for path in checkpoints(run)] == [15, STEPS]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with a real tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    tokenizer = tiny.train_sentencepiece(folder, "bpe")
    return eval_models.tokenize(
        eval_models.write_texts(folder / "text.jsonl"), tokenizer, folder / "data"
    )


@pytest.mark.parametrize("exports", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_commands_themselves(text: Path, tmp_path: Path, exports: bool, monkeypatch) -> None:
    run = tmp_path / "run"
    options = ["--watch.tasks", "last_word", "--watch.limit", "5", "--schedule.train-steps", "4"]
    options += ["--save-interval", "4", "--eval-interval", "0", "--data.num-workers", "0"]
    options += ["--watch.export-interval", "4"] if exports else []
    train(text, run, *options)
    ((step, (result,)),) = results_by_step(run).items()
    (line,) = metrics(run, "evaluation")
    assert (step, result["task"], result["items"]) == (4, "last_word", 5)
    assert line["results"][0]["metrics"] == result["metrics"]
    assert line["tokens"] == 4 * 8 * 64
    if not exports:
        return
    # The same command, typed by a person.
    again = tmp_path / "again"
    argv = ["eval", str(run), "--tasks", "last_word", "--limit", "5", "--data", str(text)]
    assert main([*argv, "--output-dir", str(again)]) == 0
    (file,) = again.glob("*.json")
    assert json.loads(file.read_text())["results"][0]["metrics"] == result["metrics"]
    model = run / "exports/step_00000004"
    assert metrics(run, "export")[0]["folder"] == "exports/step_00000004"
    assert AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True).num_parameters()
