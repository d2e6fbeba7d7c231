"""RMSNorm with Transformer Engine's kernels, which write bf16 or FP8.

Transformer Engine's own RMSNorm module passes each call to its operation fuser. The fuser takes more time
in Python than the rest of a sub-module. (Transformer Engine's linears with a fused norm do not use it.)
"""

from typing import Any

import torch
import transformer_engine_torch as tex
from torch import Tensor
from transformer_engine.pytorch import RMSNorm as TERMSNorm
from transformer_engine.pytorch.constants import TE_DType
from transformer_engine.pytorch.quantization import FP8GlobalStateManager as manager

from megatron_ladder.collectives.placeholder import placeholder, standing_for
from megatron_ladder.te.layers.quantised import Quantised


class RMSNorm(TERMSNorm):
    """Transformer Engine's RMSNorm with the arguments that megatron-core's layer specs pass."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(
            hidden_size,
            eps=eps,
            sequence_parallel=config.sequence_parallel,
            dtype=config.params_dtype,
            device="cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
        )

    def forward(self, x: Tensor, quantizer: Any = None, made: list[Any] | None = None) -> Tensor:
        """As `_Norm.forward`."""
        records = torch.is_grad_enabled()  # always False in the forward of an autograd function
        return _Norm.apply(x, self.weight, self, quantizer, records, [] if made is None else made)


def quantised_norm(x: Tensor, norm: Any, quantizer: Any) -> Tensor:
    """RMSNorm of `x` [s, b, h] that writes its output in FP8 only. Returns a placeholder of that output."""
    made: list[Any] = []
    x = norm(x, quantizer, made)  # as a module: DDP's hook sees that its weight has been gathered
    return standing_for(x, Quantised(made[0], quantizer))


class _Norm(torch.autograd.Function):
    """RMSNorm. With a quantizer its FP8 output does not pass through autograd: it is appended to `made`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        norm: Any,
        quantizer: Any,
        records: bool,
        made: list[Any],
    ) -> Tensor:
        flat = x.contiguous().view(-1, x.size(-1))
        margin = norm._sm_margins["forward"]
        y, _, rstdev = tex.rmsnorm_fwd(
            *(flat, weight, norm.eps, None, quantizer, TE_DType[x.dtype], margin),
            norm.zero_centered_gamma,
        )
        ctx.norm = norm
        # The model's first norm is its first FP8 module, and its backward runs last. With delayed scaling
        # that backward computes the scales of gradients for the next step, as in TE's own norm.
        ctx.finds_scales = records and manager.is_first_fp8_module()
        ctx.save_for_backward(flat, rstdev, weight)
        if quantizer is None:
            return y.view(x.shape)
        made.append(y)
        return placeholder(x, *x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, rstdev, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        margin = ctx.norm._sm_margins["backward"]
        dx, dweight = tex.rmsnorm_bwd(
            *(grad.view(x.shape), x, rstdev, weight, margin, ctx.norm.zero_centered_gamma)
        )
        if ctx.finds_scales:
            manager.reduce_and_update_fp8_tensors(forward=False)
        return dx.view(grad.shape), dweight, None, None, None, None
