"""What keeps the states of deep models small: norms of what sub-modules read, scales of what they add.

Residual scaling (arXiv 2510.03470): n sub-modules F_i that add their outputs as they are make a product of
n factors 1 + F_i. Expanded, it has C(n, k) terms of order k, so the states grow with depth. With lambda F_i
the terms of order k shrink by lambda^k. n is 2 num_layers, attention and MLP of each layer, in every
residual kind. Parallel kinds sum the two outputs of a layer first; the sum is multiplied. So a parallel
layer has one scale, every other layer two.
"""

from typing import Any

import torch

from megatron_ladder.collectives.points import Scale
from megatron_ladder.config import ResidualScaling


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the arguments that megatron-core's layer specs pass; for local layers.

    megatron-core's WrappedTorchNorm does the same but refuses sequence parallelism.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # With sequence parallelism each rank has a part of the sequence, so its gradient of the weight is
        # partial. This attribute makes megatron-core sum it over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def residual_scales(
    scaling: ResidualScaling, outputs: int, config: Any
) -> torch.nn.Parameter | tuple[Scale, ...]:
    """The scale of each output that a layer adds.

    Args:
        scaling: which; skipinit (arXiv 2002.10444) is a learned number that starts at 0.
        outputs: how many outputs the layer adds.
        config: megatron-core's, of the whole model.

    Returns:
        skipinit: a parameter, [outputs], the same on all tensor-parallel ranks. Else the numbers, None
        where nothing is multiplied.
    """
    if scaling == "skipinit":
        scales = torch.nn.Parameter(torch.zeros(outputs, dtype=config.params_dtype))
        # It multiplies complete outputs, so its gradient is the same on all ranks: but not when each has a
        # part of the sequence. This attribute makes megatron-core sum the ranks' gradients then.
        scales.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return scales
    n = 2 * config.num_layers
    scale = {"none": None, "1/n": n**-1.0, "1/sqrt-n": n**-0.5}[scaling]
    return (scale,) * outputs
