"""desync-n of arXiv 2501.06589: the tensor-parallel ranks sum only after every n-th sub-module.

Between two sums each rank goes its own way: its residual stream x_r gets its own partial outputs
y_r alone. They meet again in x = sum over ranks of (y_r + x_r / tp). So the model depends on the
number of ranks: it is trained and used at one tensor-parallel size.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor


def part_ways(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Identity on a state that is the same on all ranks; backward sums the ranks' gradients."""
    return copy_to_tensor_model_parallel_region(x, group=group)


def meet(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' states; backward gives each rank the gradient as it is."""
    return reduce_from_tensor_model_parallel_region(x, group=group)


def sum_weight_gradients(modules: Iterable[torch.nn.Module], group: dist.ProcessGroup) -> None:
    """Sums the gradients of weights that every rank holds whole, but used on a state of its own."""
    if group.size() == 1:
        return

    def summed(grad: Tensor) -> Any:
        grad = grad.clone()
        dist.all_reduce(grad, group=group)
        return grad

    for module in modules:
        for parameter in module.parameters():
            parameter.register_hook(summed)
