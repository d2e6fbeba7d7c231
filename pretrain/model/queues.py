"""How many hardware queues CUDA makes of its streams, and who goes first; read when CUDA and NCCL start."""

import os

from pretrain.config.train import TrainConfig


def set_queues(config: TrainConfig) -> None:
    """Sets what the user has not set. Ranks that this process starts inherit it.

    In one queue kernels begin in the order in which they are issued: a collective that is started before a
    GEMM gets its few SMs first. Megatron's advice for tensor parallelism. But what a ladder layer runs on a
    second stream under sequence parallelism waits there for collectives, and in one queue the GEMMs issued
    after it wait too (docs/design/overlap.md). So these get queues, and collectives the higher priority.
    """
    parallel = config.parallel
    second_stream = (
        config.model.residual == "ladder"
        and parallel.sequence_parallel
        and parallel.tensor_model_parallel_size > 1
    )
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "8" if second_stream else "1")
    if second_stream:
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
