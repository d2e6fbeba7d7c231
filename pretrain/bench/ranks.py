"""Ranks for benchmarks: torchrun's, or one rank of many through torch's fake process group."""

import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_ladder import cpu_platform
from pretrain.ranks import (
    launched_rank,
    local_rank,
    take_gpu,
    world_size,
)


def join(tensor_model_parallel_size: int, *, fake: bool = False) -> str:
    """Makes the process group and megatron-core's groups for tensor parallelism.

    If there are more ranks than `tensor_model_parallel_size`, they form replicas.

    Args:
        fake: this process is rank 0, and there are no other processes. Collectives return at once and move
            nothing, so they take time only on a modelled link (wire.py).

    Returns:
        The device's name.
    """
    on_cpu = cpu_platform.enable()
    if not on_cpu:
        take_gpu()
    else:
        torch.set_num_threads(1 if launched_rank() else torch.get_num_threads())
        _stay_on_own_core()
    if not dist.is_initialized():
        if fake:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group(
                "fake", store=FakeStore(), rank=0, world_size=tensor_model_parallel_size
            )
        else:
            dist.init_process_group("gloo" if on_cpu else "nccl")
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size, create_gloo_process_groups=not fake
    )
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
    return "cpu" if on_cpu else torch.cuda.get_device_name()


def _stay_on_own_core() -> None:
    """Keeps a rank and gloo's threads on one core, if there are enough cores.

    Otherwise the system may at times run two ranks on the same core, and all times would be noise.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if 1 < world_size() <= len(cores):
        os.sched_setaffinity(0, {cores[local_rank()]})
