"""The random states in a checkpoint: those of each pipeline stage, tensor rank and context rank."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)
from megatron.core.tensor_parallel.random import convert_cuda_rng_state
from torch import Tensor


def sharded_states() -> dict[str, ShardedTensor]:
    """This rank's random states, for megatron-core's `save` and `load`.

    Each is a tensor of bytes, [pipeline ranks, tensor ranks, context ranks, bytes]. All data-parallel ranks
    have the same states, since they draw the same numbers for other data: one of them is stored. With
    expert parallelism the tracker's state for experts differs between them. That does no harm: it is drawn
    from for their first weights alone, on a GPU.
    """
    stage, stages = parallel_state.get_pipeline_model_parallel_rank(), _layout()["pp"]
    tensor, tensors = parallel_state.get_tensor_model_parallel_rank(), _layout()["tp"]
    context, contexts = parallel_state.get_context_parallel_rank(), _layout()["cp"]
    return {
        name: ShardedTensor.from_rank_offsets(
            f"rng.{name}",
            state,
            *((0, stage, stages), (1, tensor, tensors), (2, context, contexts)),
            replica_id=(0, 0, parallel_state.get_data_parallel_rank()),
            prepend_axis_num=3,
        )
        for name, state in states().items()
    }


def kinds() -> dict[str, Any]:
    """What random states belong to: the layout without data parallelism, and the size in bytes of each.

    States of another kind cannot be restored here.
    """
    return {"layout": _layout(), "bytes": {n: s.numel() for n, s in states().items()}}


def restore(states: dict[str, Tensor]) -> None:
    """Gives this rank the states that `states` returned, or that were loaded for `sharded_states`."""
    tracked = {
        name.removeprefix("tracker."): state
        for name, state in states.items()
        if name.startswith("tracker.")
    }
    tracker = get_cuda_rng_tracker()
    if tracker.use_cudagraphable_rng:  # a CUDA graph refers to these generators: keep the objects
        for name, generator in tracker.get_states().items():
            generator.set_state(tracked[name])
    else:
        tracker.set_states(tracked)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def reseed(step: int) -> None:
    """Gives this rank's random states new values, by the seed that it began with and the step.

    Tensor ranks again share what they must share, and data-parallel ranks have the same states.
    """
    seed = torch.initial_seed() + step
    torch.manual_seed(seed)
    graphs = get_cuda_rng_tracker().use_cudagraphable_rng
    model_parallel_cuda_manual_seed(seed, use_cudagraphable_rng=graphs)


def _layout() -> dict[str, int]:
    return {
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "cp": parallel_state.get_context_parallel_world_size(),
    }


def states() -> dict[str, Tensor]:
    """Copies of this rank's random states, by name."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        found[f"tracker.{name}"] = convert_cuda_rng_state(state)
    return found
