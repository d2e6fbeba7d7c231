"""Batches without a data set."""

import torch

from pretrain.config.train import TrainConfig
from pretrain.data.batches import Batch


def batch_of(pieces: torch.Tensor) -> Batch:
    """Args: pieces: [sequences, tokens + 1]; labels are the tokens that follow."""
    tokens = pieces[:, :-1]
    return {
        "tokens": tokens,
        "labels": pieces[:, 1:],
        "loss_mask": torch.ones(tokens.shape),
        "position_ids": torch.arange(tokens.shape[1]).expand(tokens.shape),
    }


def random_batch(config: TrainConfig) -> Batch:
    """One micro-batch of random tokens, the same in every call."""
    assert config.model.vocab_size is not None
    shape = (config.micro_batch_size, config.data.seq_length + 1)
    generator = torch.Generator().manual_seed(0)
    return batch_of(torch.randint(0, config.model.vocab_size, shape, generator=generator))
