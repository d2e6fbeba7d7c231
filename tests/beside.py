"""A stand-in for the commands that run beside a training: fast, and it does what a test tells it to."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.watch import watch

# A folder tells the stand-in what to do, and it writes there what it has done, a line each. With a file
# STEP.dies it kills itself once; with STEP.fails it ends with 2; without STEP.go, or go, it waits.
_SCRIPT = """
import json, os, sys, time
from pathlib import Path

told, (name, checkpoint, *rest) = Path(sys.argv[1]), sys.argv[2:]
step = int(Path(checkpoint).name[5:])
with (told / "done").open("a") as file:
    file.write(f"{name} {step} {os.getpid()} {os.nice(0)} {Path('/proc/self/oom_score_adj').read_text()}")
if name == "eval":
    folder = Path(rest[rest.index("--output-dir") + 1])
    tasks = rest[rest.index("--tasks") + 1 :]
    results = [{"task": "toy", "metrics": {"acc,none": step / 100, "acc_stderr,none": 0.1}, "items": 4}]
    content = {"format": "megatron-ladder-evaluation", "version": 1, "step": step, "unix_time": time.time()}
    (folder / f"step_{step:08d}.{os.getpid()}.json").write_text(json.dumps({**content, "results": results}))
while not ((told / f"{step}.go").exists() or (told / "go").exists()):
    time.sleep(0.01)
if (dies := told / f"{step}.dies").exists():
    dies.unlink()
    os.kill(os.getpid(), 9)
if (told / f"{step}.fails").exists():
    sys.stderr.write(f"megatron-ladder {name}: task hellaswag: its data could not be loaded: no network")
    sys.exit(2)
if name == "export":
    Path(rest[0]).mkdir(parents=True)
    assert Path(checkpoint, "config.json").is_file(), "the checkpoint is gone"
"""


class StandIn:
    """Takes the place of `eval` and `export` beside trainings of this process, and of those it forks."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        folder.mkdir()
        script = folder / "stand_in.py"
        script.write_text(_SCRIPT)

        def beside(arguments: list[str], *, nice: int) -> list[str]:
            child = [sys.executable, "-m", "pretrain.watch.child", str(os.getpid()), str(nice)]
            return [*child, sys.executable, str(script), str(folder), *arguments]

        patch.setattr(watch, "beside", beside)

    def tell(self, *names: str) -> None:
        for name in names:
            (self._folder / name).touch()

    def done(self) -> list[tuple[str, int]]:
        """What was started: the command, and the checkpoint's step."""
        return [(name, int(step)) for name, step, *_ in self._lines()]

    def last(self) -> tuple[int, int, int]:
        """Of the newest process: its number, its priority, its oom_score_adj."""
        pid, priority, adjusted = map(int, self._lines()[-1][2:])
        return pid, priority, adjusted

    def _lines(self) -> list[list[str]]:
        file = self._folder / "done"
        return [line.split() for line in file.read_text().splitlines()] if file.is_file() else []


def wait_for(condition: Callable[[], object], patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
