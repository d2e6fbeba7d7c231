"""What is done beside a training: which checkpoints, one process at a time, and what comes of failures."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import tyro

from megatron_ladder.errors import UserError
from pretrain.config.train import TrainConfig
from pretrain.config.watch import WatchConfig
from pretrain.evaluation.options import EvalOptions
from pretrain.start.arguments import parse_train
from pretrain.watch import commands
from pretrain.watch.watch import LOWEST, News, Watch, scalars
from tests.beside import StandIn, wait_for

TASKS = ("--watch.tasks", "toy")
EXPORTS = ("--watch.export-interval", "10")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path / "stand_in", monkeypatch)


def configuration(run: Path, *options: str) -> TrainConfig:
    words = ["--preset", "debug", "--output-dir", str(run), "--schedule.train-steps", "100"]
    return parse_train([*words, "--save-interval", "10", "--watch.interval", "10", *options])[0]


def checkpoint(run: Path, step: int) -> int:
    folder = run / f"checkpoints/step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    return step


@contextmanager
def watching(run: Path, *options: str, lines: tuple[dict[str, Any], ...] = ()) -> Iterator[Watch]:
    with Watch(configuration(run, *options), [], lines) as watch:
        yield watch


def all_news(watch: Watch) -> list[News]:
    wait_for(lambda: not watch.is_busy())
    return watch.news()


def files(run: Path) -> list[Path]:
    return sorted((run / "evaluations").glob("*"))


def test_a_checkpoint_is_measured_and_exported(tmp_path: Path, stand_in: StandIn) -> None:
    run = tmp_path / "run"
    stand_in.tell("go")
    with watching(run, *TASKS, *EXPORTS) as watch:
        watch.saved(checkpoint(run, 10))
        measured, exported = all_news(watch)
    assert stand_in.done() == [("eval", 10), ("export", 10)]
    assert (measured.kind, measured.step, exported.kind) == ("evaluation", 10, "export")
    assert measured.facts["results"] == [
        {"task": "toy", "metrics": {"acc,none": 0.1, "acc_stderr,none": 0.1}}
    ]
    assert measured.text == "step 10: measured: toy/acc,none 0.1000"
    assert run / measured.facts["file"] in files(run)
    assert (run / exported.facts["folder"]).is_dir()
    assert list((run / "watch").iterdir()) == []
    assert stand_in.last()[1:] == (19, 1000)


def test_the_newest_waits_and_an_older_one_is_left_out(tmp_path: Path, stand_in: StandIn) -> None:
    run = tmp_path / "run"
    with watching(run, *TASKS, *EXPORTS) as watch:
        watch.saved(checkpoint(run, 10))
        wait_for(lambda: watch.doing == "evaluation of step 10" and stand_in.done())
        watch.saved(checkpoint(run, 15))  # after a signal: of no interval
        watch.saved(checkpoint(run, 20))
        watch.saved(checkpoint(run, 30))
        assert watch.held() == {10, 20, 30}  # 20 waits for its export
        (left_out,) = watch.news()
        stand_in.tell("go")
        news = all_news(watch)
        assert watch.held() == set()
    assert (left_out.kind, left_out.step) == ("watch_left_out", 20)
    why = "evaluation of step 10 took until step 30"
    assert left_out.facts == {"what": "evaluation", "reason": why}
    done = [("eval", 10), ("export", 10), ("export", 20), ("eval", 30), ("export", 30)]
    assert stand_in.done() == done
    assert [(one.kind[:4], one.step) for one in news] == [(name[:4], n) for name, n in done]


def test_two_exports_wait(tmp_path: Path, stand_in: StandIn) -> None:
    """Each keeps its checkpoint: exports that are slower than saves would fill the disk."""
    run = tmp_path / "run"
    with watching(run, *EXPORTS, "--watch.interval", "None") as watch:
        watch.saved(checkpoint(run, 10))
        wait_for(lambda: watch.doing == "export of step 10" and stand_in.done())
        for step in (20, 30, 40, 50):
            watch.saved(checkpoint(run, step))
        assert watch.held() == {10, 40, 50}
        left_out = watch.news()
        stand_in.tell("go")
        all_news(watch)
    assert [(one.kind, one.step) for one in left_out] == [("watch_left_out", n) for n in (20, 30)]
    assert left_out[0].text == "step 20: not exported: export of step 10 took until step 40"
    assert left_out[0].facts["what"] == "export"
    assert stand_in.done() == [("export", 10), ("export", 40), ("export", 50)]


def test_a_process_that_is_killed_is_started_again(tmp_path: Path, stand_in: StandIn) -> None:
    run = tmp_path / "run"
    stand_in.tell("10.dies")
    with watching(run, *TASKS) as watch:
        watch.saved(checkpoint(run, 10))
        wait_for(stand_in.done)
        assert files(run) == []  # what it had written before is nowhere to be taken for results
        stand_in.tell("go")
        (news,) = all_news(watch)
        assert (news.kind, len(files(run)), len(stand_in.done())) == ("evaluation", 1, 2)


def test_failures_are_told(tmp_path: Path, stand_in: StandIn, monkeypatch) -> None:
    run = tmp_path / "run"
    stand_in.tell("go", "10.fails")
    with watching(run, *TASKS) as watch:
        watch.saved(checkpoint(run, 10))
        measured, failed = all_news(watch)
        # One task failed: the others' results stand.
        assert (measured.kind, failed.kind) == ("evaluation", "watch_failed")
        why = "task hellaswag: its data could not be loaded: no network"
        assert (failed.facts["what"], failed.facts["reason"]) == ("evaluation", why)
        log = run / "watch/step_00000010.evaluation.log"
        assert failed.text == f"step 10: its evaluation failed: {why}. What it printed: {log}"
        assert why in log.read_text()
        monkeypatch.setattr("pretrain.watch.watch.beside", lambda *_, **__: ["/no/python"])
        watch.saved(checkpoint(run, 20))
        (failed,) = all_news(watch)
        assert "No such file or directory: '/no/python'" in failed.text
        monkeypatch.setattr(
            "pretrain.watch.watch.beside",
            lambda *_, **__: [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"],
        )
        watch.saved(checkpoint(run, 30))
        (failed,) = all_news(watch)
        assert failed.facts["reason"] == "its process was ended by signal 9"


def test_the_end_of_the_training_ends_it(tmp_path: Path, stand_in: StandIn) -> None:
    run = tmp_path / "run"
    with watching(run, *TASKS) as watch:
        watch.saved(checkpoint(run, 10))
        wait_for(stand_in.done)
        process = psutil.Process(stand_in.last()[0])
    assert not process.is_running()
    assert watch.news() == []
    assert files(run) == []
    stand_in.tell("go")
    with watching(run, *TASKS) as watch:  # the next start does it
        (news,) = all_news(watch)
    assert (news.kind, news.step) == ("evaluation", 10)


def test_a_start_does_what_is_left(tmp_path: Path, stand_in: StandIn) -> None:
    run = tmp_path / "run"
    stand_in.tell("go")
    for step in (0, 10, 20, 30, 35, 40, 100):
        checkpoint(run, step)
    lines: tuple[dict[str, Any], ...] = (
        {"kind": "evaluation", "step": 10},
        {"kind": "export", "step": 10},
        {"kind": "watch_left_out", "step": 20},
        {"kind": "watch_left_out", "step": 20, "what": "export"},
        {"kind": "watch_failed", "step": 30, "what": "evaluation"},
        {"kind": "export", "step": 30},
        {"kind": "evaluation", "step": 40},
    )
    with watching(run, *TASKS, *EXPORTS, lines=lines) as watch:
        all_news(watch)
    assert stand_in.last()[1] == os.nice(0)  # of the last step: training is over
    assert stand_in.done() == [("eval", 30), ("export", 40), ("eval", 100), ("export", 100)]


def test_what_begins_after_the_training_need_not_step_back(
    tmp_path: Path, stand_in: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    """And it is said what is waited for: once, and again after a while."""
    run = tmp_path / "run"
    for step in (10, 20):
        checkpoint(run, step)
    with caplog.at_level("INFO"), watching(run, *TASKS) as watch:
        wait_for(stand_in.done)
        for _ in range(3):
            watch.waited_for()
        assert stand_in.last()[1] == LOWEST
        stand_in.tell("go")
        all_news(watch)
    assert stand_in.last()[1] == os.nice(0)
    waits = [line for line in caplog.messages if "waiting for" in line]
    assert waits == [
        "the training is done; waiting for the evaluation of step 10 (Ctrl-C: the next start does it)"
    ]


def test_its_session_has_the_lowest_priority_too() -> None:
    """Else it would get as much time as a rank in a session of its own."""
    file = Path("/proc/self/autogroup")
    if not file.exists():
        pytest.skip("this kernel does not share out time by sessions")
    child = [sys.executable, "-m", "pretrain.watch.child", str(os.getpid()), "19", "/bin/cat"]
    said = subprocess.run([*child, str(file)], capture_output=True, text=True, check=True).stdout
    assert said.endswith("nice 19\n") and said != file.read_text()


def test_it_ends_with_its_training(tmp_path: Path) -> None:
    """However the training ends: it may be killed."""
    code = (
        "import subprocess, sys, os; "
        "child = [sys.executable, '-m', 'pretrain.watch.child', str(os.getpid()), '5']; "
        "process = subprocess.Popen([*child, '/bin/sleep', '1000']); "
        "print(process.pid, flush=True); process.wait()"
    )
    training = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert training.stdout is not None
    child = psutil.Process(int(training.stdout.readline()))
    wait_for(lambda: child.name() == "sleep")
    training.kill()
    training.wait()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_stop_signals_are_for_the_ranks(tmp_path: Path, stand_in: StandIn) -> None:
    run = tmp_path / "run"
    with watching(run, *TASKS) as watch:
        watch.saved(checkpoint(run, 10))
        wait_for(stand_in.done)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(stand_in.last()[0], number)
        stand_in.tell("go")
        (news,) = all_news(watch)
    assert news.kind == "evaluation"
    assert len(stand_in.done()) == 1


def test_other_ranks_do_nothing(tmp_path: Path, stand_in: StandIn, monkeypatch) -> None:
    run = tmp_path / "run"
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    checkpoint(run, 10)
    with watching(run, *TASKS) as watch:
        watch.saved(10)
        assert not watch.is_busy()


def test_each_checkpoint_of_an_interval_and_the_last_one(tmp_path: Path) -> None:
    words = ["--preset", "debug", "--save-interval", "7", "--schedule.train-steps", "150", *TASKS]
    config, _ = parse_train(
        [*words, "--output-dir", str(tmp_path), "--watch.export-interval", "14"]
    )
    watch = Watch(config, [], [])
    assert watch._whats(10) == []  # saved at a signal
    found = {step: watch._whats(step) for step in (*range(7, 150, 7), 150)}
    assert {step for step, whats in found.items() if "evaluation" in whats} == {
        *range(7, 150, 7),
        150,
    }
    exported = {step for step, whats in found.items() if "export" in whats}
    assert exported == {*range(14, 150, 14), 150}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"interval": 25}, "watch.interval 25 is not a multiple of save_interval 10: .* Give 30"),
        ({"export_interval": 3}, "watch.export_interval 3 is not a multiple of .* Give 10"),
        ({"interval": 0}, "watch.interval is 0: it must be at least 1"),
        ({"limit": 0}, "watch.limit is 0"),
        ({"export_interval": -10}, "watch.export_interval is -10: it must be at least 0"),
        ({"tasks": (), "limit": 3}, "name some, such as --watch.tasks last_word continuation"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        WatchConfig(**{"tasks": ("toy",), **values}).check(save_interval=10)


def test_the_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: Any = [
        SimpleNamespace(path=Path("a"), tokens=lambda split: 9),
        SimpleNamespace(path=Path("b"), tokens=lambda split: 0),  # no validation split
    ]
    config = configuration(tmp_path, "--watch.tasks", "last_word", "toy", "--watch.limit", "7")
    found = commands.eval_arguments(config, folders, Path("checkpoint"), Path("out"))
    assert " ".join(found) == (
        "eval checkpoint --output-dir out --tasks last_word toy --data a --max-tokens 1000000 --limit 7"
    )
    parsed = tyro.cli(EvalOptions, args=found[1:])
    assert parsed == EvalOptions(
        Path("checkpoint"),
        ((Path("a"),),),
        (("last_word", "toy"),),
        limit=7,
        output_dir=Path("out"),
    )
    config = configuration(tmp_path, "--watch.tasks", "perplexity", "--watch.data", "c", "d")
    assert "--data c d" in " ".join(commands.eval_arguments(config, folders, Path("x"), Path("y")))
    config = configuration(tmp_path, *TASKS, "--watch.include-path", "mine")
    found = commands.eval_arguments(config, folders, Path("x"), Path("y"))
    assert "--data" not in found
    assert found[-2:] == ["--include-path", "mine"]
    # It is no rank, it sees no GPU, and it takes the cores that the ranks leave.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MEGATRON_LADDER_ENDS"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(14)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    environment = commands.environment(alone=False)
    assert environment["OMP_NUM_THREADS"] == "8"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MEGATRON_LADDER_ENDS"} & environment.keys()
    assert environment["PATH"] == os.environ["PATH"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert commands.threads(alone=False) == 1
    assert commands.threads(alone=True) == 6


def test_the_figures_of_an_evaluation() -> None:
    results = json.loads(
        '[{"task": "toy", "metrics": {"acc,none": 0.5, "acc_stderr,none": 0.1, "n": true}},'
        ' {"task": "last_word", "data": "d", "split": "validation", "metrics": {"accuracy": 1}}]'
    )
    assert scalars(results) == {"toy/acc,none": 0.5, "last_word/d/accuracy": 1.0}
