"""The names of torch.distributed's single-tensor collectives in the installed torch.

From torch 2.13 on, each call by an older name logs a warning. The warning takes as long as the rest of
the call.
"""

import torch.distributed as dist

ALL_GATHER, REDUCE_SCATTER = (
    ("all_gather_single", "reduce_scatter_single")
    if hasattr(dist, "all_gather_single")
    else ("all_gather_into_tensor", "reduce_scatter_tensor")
)
