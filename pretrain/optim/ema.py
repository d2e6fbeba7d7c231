"""An average of the weights over the steps (EMA), kept beside the optimizer's state and sharded like it."""

from typing import Any

import torch
from torch import Tensor

from pretrain.optim.shards import own_ranges, parts_of


class Ema:
    """After each update, ema = decay * ema + (1 - decay) * weights, in fp32, of the master weights.

    Each data-parallel rank has its own ranges of the flattened parameters, as of AdamW's moments. A step
    whose update is left out leaves the average as it is.
    """

    def __init__(self, optimizer: Any, decay: float) -> None:
        """The average of one set of weights: those that the optimizer has now."""
        self._decay = decay
        self._own = [
            (part, parameter)
            for part in parts_of(optimizer)
            for parameter, _, _ in own_ranges(part)
        ]
        self._averages = [weights.detach().clone() for weights in self._weights()]

    @torch.no_grad()
    def begin(self) -> None:
        """Begins anew, with the weights as they are now: call it after loading them without an average."""
        torch._foreach_copy_(self._averages, self._weights())

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights of a step; called after its update."""
        torch._foreach_lerp_(self._averages, self._weights(), 1 - self._decay)

    def tensors(self) -> dict[Any, Tensor]:
        """For each of this rank's parameters the average of its range, 1-D fp32."""
        parameters = [parameter for _, parameter in self._own]
        return dict(zip(parameters, self._averages, strict=True))

    def _weights(self) -> list[Tensor]:
        """The master weights of this rank's ranges. Not by megatron-core's
        `_get_main_param_and_optimizer_states`, which would make empty states before the first step."""
        found = []
        for part, parameter in self._own:
            group, number = part.model_param_group_index_map[parameter]
            found.append(part.optimizer.param_groups[group]["params"][number].detach())
        return found
