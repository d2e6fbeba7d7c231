"""`python -m pretrain`: the same as `megatron-ladder train`, for torchrun."""

import sys

from pretrain.commands import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
