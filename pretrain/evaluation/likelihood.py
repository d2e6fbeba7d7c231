"""The losses that a model gives to tokens, and the likelihoods that it gives to texts."""

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

POSITIONS_AT_ONCE = (
    1024  # one position's fp32 logits take 0.5 MB with a vocabulary of 128 Ki tokens
)


@torch.no_grad()
def token_losses(
    model: Any, sequences: Sequence[np.ndarray], batch_size: int, title: str
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The cross-entropy of each token of each sequence; the longest sequences come first.

    Args:
        model: a `LadderForCausalLM`.
        sequences: token ids, each [n + 1] with n >= 1.
        batch_size: sequences in one forward pass; shorter ones are padded on the right.
        title: the title of the progress bar, which counts predicted tokens.

    Yields:
        The index of a sequence; the cross-entropy in nats of each token but the first, fp32 [n]; whether
        each of these tokens is the one that the model finds likeliest, bool [n]. Tensors are on the CPU.

    Raises:
        UserError: the model has no row for a token.
    """
    largest = max((int(ids.max()) for ids in sequences), default=0)
    if largest >= model.config.vocab_size:
        raise UserError(
            f"the text holds the token id {largest:,}, the model's ids end at "
            f"{model.config.vocab_size - 1:,}: its tokenizer has tokens that the model has no row for; "
            "leave out the text that has them"
        )
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
            states = model.model(ids[:, :-1], attention_mask=mask, use_cache=False)
            for row, i in enumerate(batch):
                length = int(lengths[row]) - 1
                some = states.last_hidden_state[row, :length]
                nats, best = _losses(model.lm_head, some, ids[row, 1 : length + 1])
                progress.update(length)
                yield i, nats, best


def _losses(head: Any, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each label, and whether it is the likeliest token; computed in parts.

    In parts, since the logits of a long sequence would take much memory.

    Args:
        head: from states to logits.
        states: [n, hidden_size], after the last norm.
        labels: int64 [n].

    Returns:
        fp32 [n] in nats, and bool [n], on the CPU.
    """
    parts = []
    for some, these in zip(
        states.split(POSITIONS_AT_ONCE), labels.split(POSITIONS_AT_ONCE), strict=True
    ):
        logits = head(some)
        nats = F.cross_entropy(logits.float(), these, reduction="none")
        parts.append((nats, logits.argmax(-1) == these))
    return torch.cat([nats for nats, _ in parts]).cpu(), torch.cat([b for _, b in parts]).cpu()


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a continuation after its context."""

    nats: float
    """Minus the natural logarithm of the continuation's probability."""
    is_greedy: bool
    """Whether greedy decoding would generate the continuation."""


@dataclass(frozen=True)
class TextModel:
    """A model with its tokenizer; it measures texts."""

    model: Any
    tokenizer: Tokenizer
    begin_ids: Sequence[int]
    """The tokens put before every context: those that the tokenizer puts before a text, otherwise the token
    that ends the document before it."""
    seq_length: int
    batch_size: int

    def likelihoods(self, pairs: Sequence[tuple[str, str]], title: str) -> list[Likelihood]:
        """The likelihood of the continuation in each (context, continuation) pair, in the pairs' order.

        The beginning of a context is cut off where both together are longer than seq_length tokens.

        Args:
            pairs: (context, continuation) texts.
            title: the title of the progress bar.

        Raises:
            UserError: a continuation alone takes more than seq_length tokens.
        """
        sequences, counts = [], []
        for context, continuation in pairs:
            before, after = split_ids(self.tokenizer, context, continuation)
            if len(after) > self.seq_length:
                raise UserError(
                    f"--seq-length {self.seq_length}: the continuation {continuation!r} has "
                    f"{len(after)} tokens; give at least as many"
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
    """The tokens of context and continuation, tokenized together, then split where the context ends.

    The first part is what the tokens of both texts and the tokens of the context alone have in common at
    their beginning. So a token that covers the end of the context and the beginning of the continuation
    belongs to the continuation. (lm-evaluation-harness splits after as many tokens as the context alone
    has. The result is the same where no token covers the split.)
    """
    whole = tokenizer.encode(context + continuation, add_special_tokens=False).ids
    alone = tokenizer.encode(context, add_special_tokens=False).ids
    same = 0
    while same < min(len(alone), len(whole) - 1) and alone[same] == whole[same]:
        same += 1
    return whole[:same], whole[same:]
