"""Stands in for the interpreter of a profile: `rank.py -m pretrain ...` trains, with NaN for the loss of
rank 1 at the steps of CHAOS_NAN.

When such a step has been passed over once, it is not computed again: that is what a fault that happens once
looks like to the run. Every step takes a while, as those of real models do: a fault must not come too late.
"""

import math
import os
import runpy
import signal
import sys
import time
from typing import Any

from pretrain.processes import STOP_SIGNALS

STEP_S = 0.05
STEPS = [int(step) for step in os.environ["CHAOS_NAN"].split()]


def spoil_losses() -> None:
    # As pretrain/__main__.py does, which comes too late here: importing takes seconds.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    from pretrain.loop import step, train

    train_step, masked_sum = train.train_step, step._masked_sum

    def is_nan(config: Any, batch: Any, output: Any) -> Any:
        return masked_sum(config, batch, output * math.nan)

    def faulty(*args: Any) -> Any:
        (number,) = args[-2].args  # of BadSteps.is_good
        step._masked_sum = is_nan if number in STEPS else masked_sum
        time.sleep(STEP_S)
        return train_step(*args)

    train.train_step = faulty


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word not in ("-u", "-P")]
    assert words[0] == "-m"
    if words[1] == "pretrain" and os.environ.get("RANK") == "1":
        spoil_losses()
    sys.argv = words[1:]
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
