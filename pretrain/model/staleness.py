"""Which layers stand being one step stale: measured, and chosen by it.

A model is changed one layer at a time: that layer's sub-modules read the state before the last, as a
ladder layer's do, all others are as they were. What the loss on a sample rises by is the layer's
staleness. The paper (arXiv 2501.06589, section 4.2) takes the last N layers instead.
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

from megatron_ladder.errors import UserError
from megatron_ladder.hf.modeling_ladder import LadderForCausalLM
from pretrain.files import write_atomically

FILE = "staleness.json"


@dataclass(frozen=True)
class Staleness:
    """Losses in nats a token, on the same sample."""

    data: str
    tokens: int
    standard: float
    """No layer is a ladder layer."""
    alone: tuple[float, ...]
    """Layer i alone is one."""

    def order(self) -> tuple[int, ...]:
        """Layers from the one that costs least to be made a ladder layer."""
        return tuple(sorted(range(len(self.alone)), key=lambda i: self.alone[i]))

    def choose(self, count: int) -> tuple[int, ...]:
        """The `count` layers that stand it best, ascending.

        Raises:
            UserError: the model has not as many.
        """
        if not 1 <= count <= len(self.alone):
            raise UserError(f"ladder layers auto:{count}: the model has {len(self.alone)} layers")
        return tuple(sorted(self.order()[:count]))


def measure_staleness(model: LadderForCausalLM, sequences: Tensor, data: str) -> Staleness:
    """Each layer's staleness; the model is left as it was.

    Args:
        model: in evaluation mode; of standard and ladder layers, which are all measured from standard.
        sequences: [count, length + 1] token ids, on the model's device.
        data: where they come from, in words.
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
    """Mean cross-entropy, in nats a token, were these the ladder layers, with the same weights.

    Raises:
        UserError: a parallel model, which has other weights.
    """
    blocks: list[Any] = list(model.model.layers)
    before = [block.residual for block in blocks]
    if "parallel" in before:
        raise UserError(
            "the model's residual is parallel: only a standard layer can be made a ladder layer"
        )
    try:
        for i, block in enumerate(blocks):
            block.residual = "ladder" if i in layers else "standard"
        return mean_loss(model, sequences)
    finally:
        for block, residual in zip(blocks, before, strict=True):
            block.residual = residual


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
    """What was measured of a run or an imported model.

    Raises:
        UserError: nothing was.
    """
    path = run / FILE
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: measure the layers first, `megatron-ladder report depth {run} "
            "--data DATA`"
        )
    facts = json.loads(path.read_text(encoding="utf-8"))
    return Staleness(**facts | {"alone": tuple(facts["alone"])})
