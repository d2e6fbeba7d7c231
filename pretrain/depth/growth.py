"""How the residual stream grows with depth, beside what the residual expansion predicts (arXiv 2510.03470).

With c_i, the size of what the i-th sub-module adds over the size of the stream that it is added to, the
stream grows by the product of |1 + c_i|, whose expansion has C(n, k) terms of order k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ladder.config import PARALLEL
from megatron_ladder.hf.modelling.modeling_ladder import LadderForCausalLM
from pretrain.depth.measures import relative
from pretrain.depth.states import run


@dataclass(frozen=True)
class Growth:
    """The size of the stream after each layer over the embedding's: geometric means over tokens."""

    measured: list[float]
    independent: list[float]
    """Predicted from sizes alone, if terms are at right angles, as independent ones are: the product of
    sqrt(1 + c_i^2)."""
    aligned: list[float]
    """Predicted if all terms point the same way: the product of 1 + c_i. No stream can grow faster."""


def measure_growth(model: LadderForCausalLM, sequences: Tensor) -> Growth:
    """Measures and predicts the growth, over all tokens.

    Args:
        sequences: int64 [count, length + 1], token ids, on the model's device; the last of each sequence
            is not read.
    """
    # Parallel layers add attention's and the MLP's output as one.
    together = torch.tensor(
        [layer.residual in PARALLEL for layer in model.model.layers], device=sequences.device
    )[:, None]
    layers = len(model.model.layers)
    sums = torch.zeros(3, layers, dtype=torch.float64, device=sequences.device)
    for sequence in tqdm(sequences, "growth", disable=None):
        seen = run(model, sequence[:-1])
        h = seen.states[:-1]
        attention, mlp = relative(seen.attention, h), relative(seen.mlp, h + seen.attention)
        both = relative(seen.layer, h)
        first, second = torch.where(together, both, attention), torch.where(together, 0, mlp)
        size = seen.states.norm(dim=-1)
        logs = (
            (size[1:] / size[0]).log(),
            (0.5 * (first.square().log1p() + second.square().log1p())).cumsum(0),
            (first.log1p() + second.log1p()).cumsum(0),
        )
        sums += torch.stack(logs).sum(2, dtype=torch.float64)
    tokens = sequences[:, 1:].numel()
    return Growth(*(total.tolist() for total in (sums / tokens).exp()))
