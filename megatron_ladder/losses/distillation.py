"""Distillation losses, with the vocabulary cut over the tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor


def distilled_losses(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    weight: float,
    temperature: float,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """The loss of distillation, and the cross-entropy that is a part of it.

    Args:
        student: the logits of the model that is trained, for this rank's part of the vocabulary.
            [b, s, vocabulary / tp], fp32 or bf16. Do not use them afterwards: they may be overwritten.
        teacher: the teacher's logits, with the same shape and dtypes.
        labels: ids of the tokens to predict. [b, s]
        weight: the share of the divergence in the loss, from 0 to 1.
        temperature: the temperature of `divergence`, above 0.
        group: the tensor-parallel ranks.

    Returns:
        (1 - weight) cross-entropy + weight `divergence`, and the cross-entropy. Both are fp32 [b, s],
        in nats per token.
    """
    from_teacher = divergence(student, teacher, temperature, group)
    cross_entropy = vocab_parallel_cross_entropy(student, labels)  # changes fp32 logits in place
    return (1 - weight) * cross_entropy + weight * from_teacher, cross_entropy


def divergence(
    student: Tensor, teacher: Tensor, temperature: float, group: dist.ProcessGroup
) -> Tensor:
    """T^2 KL(teacher || student) of each position, with both softened by the temperature T.

    The factor T^2 keeps the gradient's size the same at every temperature (Hinton et al., arXiv
    1503.02531, section 2). Only the student gets a gradient.

    Args:
        student: logits of this rank's part of the vocabulary. [..., vocabulary / tp], fp32 or bf16
        teacher: the teacher's logits, with the same shape and dtypes.
        temperature: above 0.
        group: the tensor-parallel ranks.

    Returns:
        fp32 [...], in nats, the same on every rank of the group.
    """
    return _Divergence.apply(student, teacher.detach(), temperature, group)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, temperature: float, group: dist.ProcessGroup
    ) -> Tensor:
        log_q = _log_softmax(student.float() / temperature, group)
        log_p = _log_softmax(teacher.float() / temperature, group)
        p = log_p.exp()
        total = (p * (log_p - log_q)).sum(-1)
        dist.all_reduce(total, group=group)
        ctx.save_for_backward(log_q.exp() - p)
        ctx.temperature, ctx.dtype = temperature, student.dtype
        return total * temperature**2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (difference,) = ctx.saved_tensors
        gradient = difference * (gradients[0].unsqueeze(-1) * ctx.temperature)
        return gradient.to(ctx.dtype), None, None, None


def _log_softmax(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Log-softmax over the vocabulary of all ranks: [..., vocabulary / tp] -> the same shape."""
    largest = x.amax(-1, keepdim=True)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    x = x - largest
    total = x.exp().sum(-1, keepdim=True)
    dist.all_reduce(total, group=group)
    return x - total.log()
