"""Measures each layer's staleness, and chooses the layers that lose least when made ladder layers.

For each layer, that layer alone is made a ladder layer: its sub-modules read a state without the output of
the sub-module before. A layer of a parallel model is made a parallel-ladder layer, which reads a state
without the output of the layer before. The layer's staleness is the increase of the loss on a sample. The
paper (arXiv 2501.06589, section 4.2) makes the last N layers ladder layers instead.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from megatron_ladder.config import FRESH
from megatron_ladder.errors import UserError
from megatron_ladder.hf.modelling.modeling_ladder import LadderForCausalLM
from megatron_ladder.json_files import read_json
from pretrain.config.values import from_dict
from pretrain.files import write_atomically

FILE = "staleness.json"


@dataclass(frozen=True)
class Staleness:
    """Losses of one model on one sample, in nats a token."""

    data: str
    tokens: int
    standard: float
    """The loss without ladder layers."""
    alone: tuple[float, ...]
    """For each layer, the loss when that layer alone is a ladder layer."""

    def order(self) -> tuple[int, ...]:
        """Layers, numbered from 0, sorted by the loss when they are ladder layers, the lowest first."""
        return tuple(sorted(range(len(self.alone)), key=lambda i: self.alone[i]))

    def choose(self, count: int) -> tuple[int, ...]:
        """The `count` layers with the lowest loss as ladder layers, numbered from 0, ascending.

        Raises:
            UserError: `count` is below 1, or the model has fewer layers.
        """
        if not 1 <= count <= len(self.alone):
            raise UserError(
                f"ladder layers auto:{count}: the model has {len(self.alone)} layers. Give a number from 1 "
                "up to that"
            )
        return tuple(sorted(self.order()[:count]))


def measure_staleness(model: LadderForCausalLM, sequences: Tensor, data: str) -> Staleness:
    """Measures each layer's staleness. The model is unchanged afterwards.

    Args:
        model: in evaluation mode. All layers but the measured one count as standard layers, or parallel
            ones.
        sequences: [count, length + 1] token ids, on the model's device.
        data: where the sequences come from, in words, for the report.
    """
    count = len(model.model.layers)
    losses = [
        loss_with_ladder_layers(model, sequences, layers)
        for layers in tqdm([(), *((i,) for i in range(count))], "staleness", disable=None)
    ]
    return Staleness(data, sequences[:, 1:].numel(), losses[0], tuple(losses[1:]))


def loss_with_ladder_layers(
    model: LadderForCausalLM, sequences: Tensor, layers: Sequence[int]
) -> float:
    """Mean cross-entropy, in nats a token, with `layers` as the ladder layers and the same weights."""
    blocks: list[Any] = list(model.model.layers)
    before = [block.residual for block in blocks]
    stale, fresh = kinds_of_layers(model)
    try:
        for i, block in enumerate(blocks):
            block.residual = stale if i in layers else fresh
        return mean_loss(model, sequences)
    finally:
        for block, residual in zip(blocks, before, strict=True):
            block.residual = residual


def kinds_of_layers(model: LadderForCausalLM) -> tuple[str, str]:
    """What each layer of the model can be with its weights: a ladder layer of a kind, or the other kind."""
    residual = model.config.residual
    return next(pair for pair in FRESH.items() if residual in pair)


@torch.no_grad()
def mean_loss(model: LadderForCausalLM, sequences: Tensor) -> float:
    """Mean cross-entropy, in nats a token, of [count, length + 1] token ids."""
    total = 0.0
    for sequence in sequences:  # one at a time: logits are large
        logits = model(sequence[None, :-1], use_cache=False).logits[0]
        total += F.cross_entropy(logits.float(), sequence[1:], reduction="sum").item()
    return total / sequences[:, 1:].numel()


def save_staleness(run: Path, staleness: Staleness) -> None:
    write_atomically(run / FILE, json.dumps(asdict(staleness), indent=1) + "\n")


def saved_staleness(run: Path) -> Staleness:
    """Reads the measured staleness of a run or an imported model.

    Raises:
        UserError: it has not been measured.
    """
    path = run / FILE
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: measure the layers first, with `megatron-ladder report depth {run} "
            "--data DATA`"
        )
    staleness: Staleness = from_dict(Staleness, read_json(path, "measured layers"), str(path))
    return staleness
