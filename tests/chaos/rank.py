"""Stands in for the interpreter of a profile: `rank.py -P -m pretrain ...` trains, with faults.

The loss of rank 1 is NaN at the steps of CHAOS_NAN. When such a step has been passed over once, it is not
computed again: that is what a fault that happens once looks like to the run. Other faults come when a file
appears in CHAOS_FOLDER (faults.py makes it):

    raise.1      rank 1 fails in its next step, and removes the file
    slow         every fsync of rank 0 takes as many seconds as the file says, while the file is there
    stalled      the next fsync of rank 0 takes as many seconds as the file says, once

Every step takes a while, as those of real models do: a fault must not come too late.
"""

import math
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

from pretrain.processes import STOP_SIGNALS

STEP_S = 0.05
STEPS = [int(step) for step in os.environ["CHAOS_NAN"].split()]
FOLDER = Path(os.environ["CHAOS_FOLDER"])


def spoil_steps(rank: int) -> None:
    # As pretrain/__main__.py does, which comes too late here: importing takes seconds.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    from pretrain.loop import step, train

    train_step, masked_sum = train.train_step, step._masked_sum

    def is_nan(config: Any, batch: Any, output: Any) -> Any:
        return masked_sum(config, batch, output * math.nan)

    def faulty(*args: Any) -> Any:
        if rank == 1:
            number = args[-1]  # the step, which train.py gives last
            step._masked_sum = is_nan if number in STEPS else masked_sum
            time.sleep(STEP_S)
        fault = FOLDER / f"raise.{rank}"
        if fault.exists():
            fault.unlink()
            raise RuntimeError("a fault of chaos")
        return train_step(*args)

    train.train_step = faulty


def slow_disk() -> None:
    """Of this process and of those that it forks: they write checkpoints."""
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        for fault in (FOLDER / "slow", FOLDER / "stalled"):
            try:
                seconds = float(fault.read_text())
                if fault.name == "stalled":
                    fault.unlink()
                    (FOLDER / "has stalled").touch()
                time.sleep(seconds)
            except FileNotFoundError:
                pass
        fsync(descriptor)

    os.fsync = slow


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word not in ("-u", "-P")]
    assert words[0] == "-m"
    if words[1] == "pretrain" and (number := os.environ.get("RANK")):
        spoil_steps(int(number))
        if number == "0":
            slow_disk()
    sys.argv = words[1:]
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
