"""`megatron-ladder train` on the stand-in kernels, on one rank."""

import sys

if __name__ == "__main__":  # not in processes that it spawns
    from tests.te_stand_in import kernels

    kernels.install()
    from pretrain.commands.train import train
    from pretrain.run import status

    status.device_figures = lambda: []
    sys.exit(train(sys.argv[1:]))
