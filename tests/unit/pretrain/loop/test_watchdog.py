"""The watchdog, in processes of its own, as it ends them. Its seconds are shorter here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
PROGRAM = """
import logging, sys, time
from dataclasses import replace
from pathlib import Path
from pretrain.config.faults import FaultConfig
from pretrain.config.presets import PRESETS
from pretrain.loop import watchdog as module
from pretrain.loop.watchdog import Watchdog

logging.basicConfig(level=logging.INFO, format="%(message)s")
module.POLL_S, module.GRACE_S, module.SAY_EVERY_S = 0.05, 0.0, 0.3
LIMIT = 0.8
def config(**faults):
    return replace(PRESETS["debug"](), output_dir=Path("run"), faults=FaultConfig(**faults))
def never(): time.sleep(60)
def some(): time.sleep(0.5 * LIMIT)
def long(): time.sleep(2.5 * LIMIT)
assert "torch" not in sys.modules  # its import may hang, too
with Watchdog() as watchdog:
    {actions}
print("ended")
"""


def run(folder: Path, actions: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(actions=actions)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )


def test_a_phase_of_the_start_that_hangs_is_named(tmp_path: Path) -> None:
    done = run(
        tmp_path, "watchdog.know(config(start_s=LIMIT)); watchdog.phase('reading x'); never()"
    )
    assert done.returncode == 1 and "ended" not in done.stdout
    said = "the start hangs at reading x: no progress for 1 s (faults.start_s)"
    assert f"rank 0: {said}: writing its stacks to run/hangs" in done.stderr
    assert "starting for 0 s: reading x" in done.stderr
    stacks = (tmp_path / "run/hangs/start.rank_0.txt").read_text()
    assert said in stacks and "in never" in stacks


def test_so_is_a_hang_before_the_configuration_is_known(tmp_path: Path) -> None:
    done = run(
        tmp_path, "watchdog._faults = FaultConfig(start_s=LIMIT); watchdog.progress(); never()"
    )
    assert done.returncode == 1
    assert "the start hangs at importing the libraries" in done.stderr
    assert "in never" in done.stderr


def test_stacks_that_no_file_takes_are_printed(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    done = run(tmp_path, "watchdog.know(config(start_s=LIMIT)); never()")
    assert done.returncode == 1 and "in never" in done.stderr


@pytest.mark.parametrize(
    "actions",
    [
        "know(config(start_s=LIMIT)); [(watchdog.phase(str(i)), some()) for i in range(4)]",
        "know(config(start_s=LIMIT)); [(watchdog.progress(str(i)), some()) for i in range(4)]",
        "know(config(start_s=LIMIT)); watchdog.step_ended(1, 0.1); long()",  # steps have their own
        "know(config(start_s=0, hang_s=LIMIT)); long()",
        "know(config(start_s=LIMIT, hang_s=0)); watchdog.step_ended(1, 0.1); long()",
        "know(config(start_s=9, hang_s=LIMIT)); watchdog.phase('x'); watchdog.allow_more(); long()",
        "know(config(start_s=LIMIT)); watchdog.stop(); long()",
    ],
)
def test_what_goes_on_is_left_alone(actions: str, tmp_path: Path) -> None:
    done = run(tmp_path, f"watchdog.{actions}")
    assert done.returncode == 0 and "ended" in done.stdout, done.stderr
    assert not (tmp_path / "run").exists()


def test_a_step_that_hangs_has_the_steps_limit(tmp_path: Path) -> None:
    actions = (
        "watchdog.know(config(start_s=99, hang_s=LIMIT)); watchdog.step_ended(4, 0.01); never()"
    )
    done = run(tmp_path, actions)
    assert done.returncode == 1 and "no sign of step 5 for 1 s" in done.stderr
    assert (tmp_path / "run/hangs/step_5.rank_0.txt").is_file()
