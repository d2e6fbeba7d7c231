"""`python -m pretrain`: the same as `megatron-ladder train`, for torchrun."""

import sys

from pretrain.commands import train
from pretrain.launch import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    sys.exit(train(sys.argv[1:]))
