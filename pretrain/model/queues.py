"""Sets how many hardware queues CUDA uses for its streams, and the priority of NCCL's streams.

CUDA and NCCL read these environment variables when they start.
"""

import os

from megatron_ladder.config import STALE
from pretrain.config.train import TrainConfig

ONE, SEVERAL = 1, 8
"""Numbers of queues: for work on one stream, and on two."""
PRIORITY = "TORCH_NCCL_HIGH_PRIORITY"
"""The variable for the priority of NCCL's streams."""


def set_queues(config: TrainConfig) -> None:
    """Sets the variables that the user has not set. Ranks that this process starts inherit them.

    With one queue, kernels begin in the order in which they are issued. So a collective that is started
    before a GEMM gets the few SMs that it needs first. This is Megatron's advice for tensor and context
    parallelism.

    But with sequence parallelism, or experts, a layer that hides its collectives (a ladder layer, or one
    with halves) runs work on a second stream, and that work waits for collectives. With one queue, the
    GEMMs issued after it would wait as well (docs/design/overlap.md). So these runs get 8 queues, and
    NCCL's streams a higher priority.
    """
    parallel = config.parallel
    hides = config.model.residual in STALE or parallel.tp_overlap == "halves"
    cut = parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1
    second_stream = hides and (cut or config.model.experts.num_moe_experts is not None)
    for name, value in queue_variables(SEVERAL if second_stream else ONE).items():
        os.environ.setdefault(name, value)


def queue_variables(queues: int) -> dict[str, str]:
    """The environment variables for so many queues. With several, NCCL's streams have a higher priority."""
    priority = {PRIORITY: "1"} if queues > ONE else {}
    return {"CUDA_DEVICE_MAX_CONNECTIONS": str(queues), **priority}
