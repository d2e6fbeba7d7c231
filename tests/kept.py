"""The bytes that a forward keeps for its backward."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_ladder.collectives.points import SubmoduleCollectives


def kept_by(
    forward: Callable[[], Tensor],
    parameters: list[Tensor],
    also: Callable[[], list[Tensor]] = list,
) -> int:
    """Bytes that backward needs after `forward`, besides the parameters.

    Args:
        also: after forward, tensors that are kept where autograd does not see them.
    """
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept: list[Tensor] = []  # held, lest an address be used twice
    start_input = SubmoduleCollectives.start_input
    all_collectives: list[SubmoduleCollectives] = []

    def start(self: SubmoduleCollectives, x: Tensor) -> Tensor:
        all_collectives.append(self)
        return start_input(self, x)

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        SubmoduleCollectives.start_input = start  # type: ignore[method-assign]
        loss = forward()
        SubmoduleCollectives.start_input = start_input  # type: ignore[method-assign]
    # Autograd does not see the shards of inputs, which collectives keep.
    kept += [c._input_shard for c in all_collectives if c._input_shard is not None]
    kept += also()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    loss.backward()  # after the counting: it frees
    return sum(size for address, size in storages.items() if address not in known)
