"""torch.distributed's collectives of one tensor, by the names that this torch calls them.

From 2.13 on it warns at each call by the older ones, which takes as long as the rest of the call.
"""

import torch.distributed as dist

ALL_GATHER, REDUCE_SCATTER = (
    ("all_gather_single", "reduce_scatter_single")
    if hasattr(dist, "all_gather_single")
    else ("all_gather_into_tensor", "reduce_scatter_tensor")
)
