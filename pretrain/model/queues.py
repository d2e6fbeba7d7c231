"""Sets how many hardware queues CUDA uses for its streams, and the priority of NCCL's streams.

CUDA and NCCL read these environment variables when they start.
"""

import os

from megatron_ladder.config import STALE
from pretrain.config.train import TrainConfig


def set_queues(config: TrainConfig) -> None:
    """Sets the variables that the user has not set. Ranks that this process starts inherit them.

    With one queue, kernels begin in the order in which they are issued. So a collective that is started
    before a GEMM gets the few SMs that it needs first. This is Megatron's advice for tensor parallelism.

    But with sequence parallelism a layer that hides its collectives runs work on a second stream, and that
    work waits for them. With one queue, the GEMMs issued after it would wait as well
    (docs/design/overlap.md). So these runs get 8 queues, and NCCL's streams a higher priority.
    """
    parallel = config.parallel
    second_stream = (
        (config.model.residual in STALE or parallel.tp_overlap == "halves")
        and parallel.sequence_parallel
        and parallel.tensor_model_parallel_size > 1
    )
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "8" if second_stream else "1")
    if second_stream:
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
