"""desync-n of arXiv 2501.06589: the tensor-parallel ranks sum only after every n-th sub-module.

Between two sums the ranks have different residual streams: rank r adds only its own partial output y_r to
its residual stream x_r. The next sum makes them equal again: x = sum over the ranks of (y_r + x_r / tp). So
the model depends on the number of ranks. It is trained and used at one tensor-parallel size.
"""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from megatron_ladder.collectives.points import output_start


def run(layer: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Runs one desync layer (layer.py): [s, b, h] -> [s, b, h].

    Args:
        layer: a LadderTransformerLayer.
        kwargs: for self-attention.
    """
    number = 2 * (layer.layer_number - 1)  # the number of sub-modules before this one
    last = 2 * layer.config.num_layers
    for name, scale in zip(layer.submodules, layer.residual_scales, strict=True):
        norm = layer.input_layernorm if name == "attention" else layer.pre_mlp_layernorm
        if number % layer.desync_interval == 0:
            x = part_ways(x, layer.tp_group)
        number += 1
        output = layer._compute(name, norm(x), **(kwargs if name == "attention" else {}))
        output = output_start(output, None, scale)
        if number % layer.desync_interval == 0 or number == last:
            x = meet(layer._add(x / layer.tp_group.size(), output), layer.tp_group)
        else:
            x = layer._add(x, output)
    return x


def part_ways(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Starts a part of the model in which the ranks' states differ: identity, [s, b, h].

    `x` is the same on all ranks. Backward sums the ranks' gradients.
    """
    return copy_to_tensor_model_parallel_region(x, group=group)


def meet(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Ends that part: sums the ranks' states, [s, b, h]. Backward passes the gradient on unchanged."""
    return reduce_from_tensor_model_parallel_region(x, group=group)


def sum_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Makes backward sum the gradients of `parameters` over the ranks.

    Every rank has them whole, but applies them to its own, different state.
    """
    if group.size() == 1:
        return

    def summed(grad: Tensor) -> Any:
        grad = grad.clone()
        dist.all_reduce(grad, group=group)
        return grad

    for parameter in parameters:
        parameter.register_hook(summed)
