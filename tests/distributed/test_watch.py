"""Runs whose checkpoints are measured and exported beside them, and faults in the middle of that."""

import json
import signal
import time
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM

from pretrain.cli import main
from pretrain.evaluation.results import results_by_step
from pretrain.run.folder import checkpoint_at, checkpoint_step, checkpoints
from pretrain.watch.commands import export_arguments
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


def lines(run: Path) -> list[tuple[str, int]]:
    kinds = ("evaluation", "export", "watch_failed", "watch_left_out")
    return [(kind, line["step"]) for kind in kinds for line in metrics(run, kind)]


def test_what_is_killed_is_done_by_the_next_start(
    data: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    """The process beside the run is killed, then the run itself while the process works."""
    run, plain = tmp_path / "run", tmp_path / "plain"
    options = tensor_parallel(2)
    train(data, plain, *options)

    # That of step 5 is killed and started again. That of step 10 does not end before the run is killed.
    stand_in.tell("5.go", "5.dies")
    argv = command(data, run, *options, *WATCH)[4:]
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

    stand_in.tell("go")
    train(data, run, *options, *WATCH)
    assert_same(run, plain)
    measured = {step for kind, step in lines(run) if kind in ("evaluation", "watch_left_out")}
    assert measured == {5, 10, 15, STEPS}
    assert ("evaluation", 10) in lines(run)
    assert ("evaluation", STEPS) in lines(run)
    assert [step for kind, step in lines(run) if kind == "export"] == [10, STEPS]
    assert not [kind for kind, _ in lines(run) if kind == "watch_failed"]
    assert set(results_by_step(run)) == {step for kind, step in lines(run) if kind == "evaluation"}
    assert list((run / "watch").iterdir()) == []
    assert [checkpoint_step(path) for path in checkpoints(run)] == [15, STEPS]


def test_a_checkpoint_stays_while_it_is_needed(
    data: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    """Also at the end: a signal ends the wait for the last one, and the next start goes on with it."""
    run = tmp_path / "run"
    options = (*WATCH, "--watch.export-interval", "5", "--save-interval", "5", "--keep-last", "2")
    argv = command(data, run, *options)[4:]
    seen: list[int] = []

    def told() -> bool:
        """Asks the run to stop when its steps are done and the first measurement still goes on."""
        if checkpoint_at(run, STEPS).is_dir() and not seen:
            seen.extend(checkpoint_step(path) for path in checkpoints(run))
            time.sleep(1)
            parent = psutil.Process(stand_in.last()[0]).parent()
            assert parent is not None
            parent.send_signal(signal.SIGTERM)
        return False

    codes, output = run_train(argv, tmp_path / "log", TIMEOUT_S, kill_when=told)
    assert codes == [75], output
    assert seen == [5, 10, 15, STEPS]
    assert stand_in.done() == [("eval", 5)]
    assert metrics(run, "end")[-1]["reason"] == "signal SIGTERM"
    stand_in.tell("go", f"{STEPS}.fails")
    output = train(data, run, *options)
    assert f"step {STEPS} was saved, without its evaluation and export" in output
    assert "no network" in output  # a failure does not end the run
    assert metrics(run, "end")[-1]["reason"] == "finished"
    assert {step for kind, step in lines(run) if kind == "watch_failed"} == {STEPS}
    assert [checkpoint_step(path) for path in checkpoints(run)] == [15, STEPS]
    assert "nothing to do" in train(data, run, *options)


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
    # The same command, typed by a person.
    again = tmp_path / "again"
    argv = ["eval", str(run), "--tasks", "last_word", "--limit", "5", "--data", str(text)]
    assert main([*argv, "--output-dir", str(again)]) == 0
    (file,) = again.glob("*.json")
    assert json.loads(file.read_text())["results"][0]["metrics"] == result["metrics"]
    if exports:
        model = run / "exports/step_00000004"
        assert metrics(run, "export")[0]["folder"] == "exports/step_00000004"
        assert AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True).num_parameters()
    else:
        assert main(export_arguments(checkpoint_at(run, 4), tmp_path / "model")) == 0
