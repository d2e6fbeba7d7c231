"""Which rank this process is, before torch.distributed has started."""

import os


def is_first_rank() -> bool:
    """Whether this process speaks for all ranks; torchrun sets RANK."""
    return os.environ.get("RANK", "0") == "0"
