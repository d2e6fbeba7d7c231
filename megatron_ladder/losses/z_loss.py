"""Cross-entropy, and the logarithm of the softmax's sum for z-loss (PaLM, arXiv 2204.02311, section 5).

megatron-core has a z-loss of its routers, and none of the output logits.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from torch import Tensor


def cross_entropy_and_log_z(
    logits: Tensor, labels: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each token, and log Z, where Z is the sum of the exponentials of its logits.

    Both come from one softmax, as megatron-core computes it (not its fused kernel). So this keeps no more
    for backward than megatron-core's cross-entropy alone.

    Args:
        logits: of this rank's part of the vocabulary. [b, s, vocabulary / tp], fp32 or bf16. Do not use
            them afterwards: fp32 ones are overwritten.
        labels: ids of the tokens to predict. [b, s]
        group: the tensor-parallel ranks.

    Returns:
        Both fp32 [b, s], the cross-entropy in nats.
    """
    return _CrossEntropyAndLogZ.apply(logits, labels, group)


class _CrossEntropyAndLogZ(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        parts = VocabParallelCrossEntropy
        given, size = logits.dtype, logits.shape[-1]
        logits, largest = parts.calculate_logits_max(logits)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        first = group.rank() * size
        elsewhere, columns, predicted, total, exponentials = parts.calculate_predicted_logits(
            logits, labels, largest, first, first + size
        )
        dist.all_reduce(predicted, group=group)
        dist.all_reduce(total, group=group)
        log_z = largest + total.log()
        softmax, cross_entropy = parts.calculate_cross_entropy_loss(exponentials, predicted, total)
        ctx.save_for_backward(softmax, elsewhere, columns)
        ctx.dtype = given
        return cross_entropy, log_z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        softmax, elsewhere, columns = ctx.saved_tensors
        of_cross_entropy, of_log_z = gradients
        gradient = softmax.mul_((of_cross_entropy + of_log_z).unsqueeze(-1))
        rows = torch.arange(columns.numel(), device=columns.device)
        here = of_cross_entropy.masked_fill(elsewhere, 0.0)
        gradient.view(-1, softmax.shape[-1])[rows, columns] -= here.view(-1)
        return gradient.to(ctx.dtype), None, None
