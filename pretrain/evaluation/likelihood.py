"""What a model thinks of tokens and of text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from megatron_ladder.errors import UserError

POSITIONS_AT_ONCE = 1024  # a position's fp32 logits take 0.5 MB at a vocabulary of 128 Ki


@torch.no_grad()
def token_losses(
    model: Any, sequences: Sequence[np.ndarray], batch_size: int, title: str
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each sequence's cross-entropies, the longest sequences first.

    Args:
        model: a causal language model of transformers' interface.
        sequences: token ids, each [n + 1] with n >= 1.
        batch_size: sequences in one forward pass; shorter ones are padded on the right.
        title: of the progress bar, which counts predicted tokens.

    Yields:
        A sequence's number; nats of each token but its first, fp32 [n]; whether each of them is the
        model's likeliest, bool [n]. On the CPU.
    """
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    total = sum(map(len, sequences)) - len(sequences)
    with tqdm(total=total, desc=title, unit="tok", unit_scale=True, disable=None) as progress:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            lengths = torch.tensor([len(sequences[i]) for i in batch])
            ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.int64)
            for row, i in enumerate(batch):
                ids[row, : lengths[row]] = torch.from_numpy(sequences[i].astype(np.int64))
            ids = ids.to(model.device)
            mask = None
            if lengths.min() < lengths.max():
                mask = torch.arange(ids.shape[1] - 1) < lengths[:, None] - 1
                mask = mask.to(model.device, torch.int64)
            logits = model(ids[:, :-1], attention_mask=mask, use_cache=False).logits
            for row, i in enumerate(batch):
                length = int(lengths[row]) - 1
                nats, best = _losses(logits[row, :length], ids[row, 1 : length + 1])
                progress.update(length)
                yield i, nats, best


def _losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[n, vocab_size] and [n] -> [n] and [n]; a part at a time, as fp32 logits are large."""
    parts = []
    for some, these in zip(
        logits.split(POSITIONS_AT_ONCE), labels.split(POSITIONS_AT_ONCE), strict=True
    ):
        nats = F.cross_entropy(some.float(), these, reduction="none")
        parts.append((nats, some.argmax(-1) == these))
    return torch.cat([nats for nats, _ in parts]).cpu(), torch.cat([b for _, b in parts]).cpu()


@dataclass(frozen=True)
class Likelihood:
    """Of a text, after another."""

    nats: float
    """Minus the logarithm of its probability."""
    is_greedy: bool
    """Whether taking the likeliest token each time would write it."""


@dataclass(frozen=True)
class TextModel:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Tokenizer
    begin_ids: Sequence[int]
    """Stand before every context: what the tokenizer puts before a text, else the token that ends the
    document before it."""
    seq_length: int
    batch_size: int

    def likelihoods(self, pairs: Sequence[tuple[str, str]], title: str) -> list[Likelihood]:
        """Of each (context, continuation) the continuation's. Contexts too long lose their beginning.

        Raises:
            UserError: a continuation takes more than seq_length tokens.
        """
        sequences, counts = [], []
        for context, continuation in pairs:
            before, after = split_ids(self.tokenizer, context, continuation)
            if len(after) > self.seq_length:
                raise UserError(
                    f"--seq-length {self.seq_length}: the continuation {continuation!r} has "
                    f"{len(after)} tokens"
                )
            ids = [*self.begin_ids, *before, *after][-self.seq_length - 1 :]
            sequences.append(np.array(ids))
            counts.append(len(after))
        found: dict[int, Likelihood] = {}
        for i, nats, best in token_losses(self.model, sequences, self.batch_size, title):
            last = slice(len(nats) - counts[i], None)
            found[i] = Likelihood(nats[last].double().sum().item(), bool(best[last].all()))
        return [found[i] for i in range(len(pairs))]


def split_ids(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of both together, cut where the context ends.

    A token that reaches over the cut is what the context alone does not begin with: it counts as the
    continuation's. (lm-evaluation-harness cuts after as many tokens as the context alone has, which
    is the same where none reaches over.)
    """
    whole = tokenizer.encode(context + continuation, add_special_tokens=False).ids
    alone = tokenizer.encode(context, add_special_tokens=False).ids
    same = 0
    while same < min(len(alone), len(whole) - 1) and alone[same] == whole[same]:
        same += 1
    return whole[:same], whole[same:]
