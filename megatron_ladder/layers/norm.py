"""RMSNorm for machines without Transformer Engine."""

from typing import Any

import torch


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the arguments that megatron-core's layer specs pass.

    megatron-core's WrappedTorchNorm does the same but refuses sequence parallelism.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # With sequence parallelism each rank has a part of the sequence, so its gradient of the weight is
        # partial. This attribute makes megatron-core sum it over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
