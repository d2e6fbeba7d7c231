"""What megatron-core's engines do not do before they choose a token: done to the logits themselves.

In transformers' order: repetition penalty, fewest tokens; then megatron-core's temperature, top_k, top_p.
A temperature does not change which the k likeliest are, so top_k may come before it.
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from megatron_ladder.inference.requests import Request, Sampling


def is_needed(sampling: Sampling) -> bool:
    """Whether `adjust` would change anything."""
    return (
        sampling.repetition_penalty != 1
        or sampling.min_new_tokens > 0
        or (sampling.top_k is not None and sampling.top_p is not None)
    )


def adjust(logits: Tensor, request: Request, new_ids: Sequence[int], ends: Collection[int]) -> None:
    """Changes the logits of a request's next token in place.

    Args:
        logits: [vocab_size].
        new_ids: what has followed the prompt so far.
        ends: the tokens that end this text.
    """
    sampling = request.sampling
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*request.prompt_ids, *new_ids}), device=logits.device)
        old, penalty = logits[seen], sampling.repetition_penalty
        logits[seen] = torch.where(old < 0, old * penalty, old / penalty)
    if len(new_ids) < sampling.min_new_tokens:
        logits[[i for i in ends if i < len(logits)]] = -math.inf
    keep_likeliest(logits, sampling)


def keep_likeliest(logits: Tensor, sampling: Sampling) -> None:
    """Applies top_k where top_p is given too, of which megatron-core takes one. [..., vocab_size]"""
    if sampling.top_k is not None and sampling.top_p is not None:
        count = min(sampling.top_k, logits.shape[-1])
        least = torch.topk(logits, count).values[..., -1:]
        logits.masked_fill_(logits < least, -math.inf)
