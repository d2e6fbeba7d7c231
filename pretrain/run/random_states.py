"""The random states in a checkpoint: those of each pipeline stage, tensor rank and context rank; of each
data-parallel rank, too, where they draw other numbers."""

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


def sharded_states(config: Any) -> dict[str, ShardedTensor]:
    """This rank's random states, for megatron-core's `save` and `load`.

    Each is a tensor of bytes, [pipeline ranks, tensor ranks, context ranks, bytes]. Data-parallel ranks
    have the same states, since they draw the same numbers for other data: one of them is stored. With
    expert parallelism the tracker's state for experts differs between them. That does no harm: it is drawn
    from for their first weights alone, on a GPU.

    Where documents are apart, attention draws its dropout for each document by itself, and the ranks have
    other documents: then each data-parallel rank's states are stored, along a fourth axis before the bytes.

    Args:
        config: the model's, a `LadderConfig`.
    """
    places = [
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
    ]
    replica = parallel_state.get_data_parallel_rank()
    layout = _layout(config)
    if "dp" in layout:
        places, replica = [*places, replica], 0
    axes = enumerate(zip(places, layout.values(), strict=True))
    offsets = [(axis, place, size) for axis, (place, size) in axes]
    return {
        name: ShardedTensor.from_rank_offsets(
            f"rng.{name}",
            state,
            *offsets,
            replica_id=(0, 0, replica),
            prepend_axis_num=len(offsets),
        )
        for name, state in states().items()
    }


def kinds(config: Any) -> dict[str, Any]:
    """What random states belong to: the layout, and the size in bytes of each.

    Data parallelism is a part of the layout only where its ranks have states of their own. States of
    another kind cannot be restored here.

    Args:
        config: as in `sharded_states`.
    """
    return {"layout": _layout(config), "bytes": {n: s.numel() for n, s in states().items()}}


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

    Tensor ranks again share what they must share, and data-parallel ranks begin with the same states.
    """
    seed = torch.initial_seed() + step
    torch.manual_seed(seed)
    graphs = get_cuda_rng_tracker().use_cudagraphable_rng
    model_parallel_cuda_manual_seed(seed, use_cudagraphable_rng=graphs)


def _layout(config: Any) -> dict[str, int]:
    """The sizes of the axes along which random states differ."""
    sizes = {
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "cp": parallel_state.get_context_parallel_world_size(),
    }
    if config.documents_apart and config.attention_dropout > 0:
        sizes["dp"] = parallel_state.get_data_parallel_world_size()
    return sizes


def states() -> dict[str, Tensor]:
    """Copies of this rank's random states, by name."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        found[f"tracker.{name}"] = convert_cuda_rng_state(state)
    return found
