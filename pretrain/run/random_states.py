"""The random states of a rank, which dropout draws from."""

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import convert_cuda_rng_state
from torch import Tensor


def states() -> dict[str, Tensor]:
    """Copies of this rank's random states, by name."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        found[f"tracker.{name}"] = convert_cuda_rng_state(state)
    return found


def restore(states: dict[str, Tensor]) -> None:
    """Gives this rank the random states that `states` has returned."""
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
