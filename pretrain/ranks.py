"""The rank of this process, also before torch.distributed has started."""

import os


def is_first_rank() -> bool:
    """Whether this process is rank 0, which logs and writes files for all ranks.

    Reads RANK, which torchrun sets; a process without it is the only rank.
    """
    return os.environ.get("RANK", "0") == "0"
