"""`python -m pretrain`: the same as `megatron-ladder train`, for torchrun and srun."""

import signal
import sys

from pretrain.cli import main
from pretrain.processes import STOP_SIGNALS, die_with_parent

if __name__ == "__main__":
    die_with_parent()
    # Kept until training listens (stopping.py): starting takes seconds, in which they would kill.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    sys.exit(main(["train", *sys.argv[1:]]))
