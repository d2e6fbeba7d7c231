"""The loss with single layers changed: made ladder layers, or ladder layers made standard or parallel."""

from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from megatron_ladder.config import STALE
from megatron_ladder.hf.modelling.modeling_ladder import LadderForCausalLM
from pretrain.model.staleness import (
    Staleness,
    kinds_of_layers,
    loss_with_ladder_layers,
    measure_staleness,
)


@dataclass(frozen=True)
class Rule:
    """A number of ladder layers, chosen in two ways: by auto:N, and the last N. Losses in nats a token."""

    count: int
    chosen: tuple[int, ...]
    """The layers of auto:N: those whose change alone raises the loss least."""
    chosen_loss: float
    """The loss with the layers of auto:N as ladder layers."""
    last_loss: float
    """The loss with the last N layers as ladder layers (arXiv 2501.06589, section 4.2)."""


@dataclass(frozen=True)
class Conversion:
    """The losses of a model with layers changed, in nats a token. The weights stay as they are."""

    to: str
    """The residual that the changed layers get: ladder or standard, parallel-ladder or parallel."""
    alone: dict[int, float]
    """For each layer that can be changed, the loss when only this layer is changed."""
    rules: list[Rule]
    staleness: Staleness | None
    """What `auto:N` needs; None for a model that has ladder layers already."""

    @property
    def back(self) -> bool:
        """Whether ladder layers were made standard or parallel."""
        return self.to not in STALE


def measure_conversion(model: LadderForCausalLM, sequences: Tensor, data: str) -> Conversion:
    """Changes one layer at a time and measures the loss.

    The layers of a standard model are made ladder layers, those of a parallel model parallel-ladder layers.
    In a model with such layers, these are made standard or parallel: the model was trained with the older
    state, so for it the last state is the change.

    Args:
        sequences: int64 [count, length + 1], token ids, on the model's device.
        data: where the sequences come from, in words.
    """
    stale, fresh = kinds_of_layers(model)
    ladder = model.config.ladder_layer_indices()
    if ladder:
        alone = {
            layer: loss_with_ladder_layers(model, sequences, [i for i in ladder if i != layer])
            for layer in tqdm(ladder, f"made {fresh}", disable=None)
        }
        return Conversion(fresh, alone, [], None)
    staleness = measure_staleness(model, sequences, data)
    layers = len(staleness.alone)
    counts = sorted({max(1, round(layers * share)) for share in (0.25, 0.5, 0.75)})
    rules = []
    for count in tqdm(counts, "auto:N and last N", disable=None):
        chosen = staleness.choose(count)
        last = range(layers - count, layers)
        losses = [loss_with_ladder_layers(model, sequences, rule) for rule in (chosen, last)]
        rules.append(Rule(count, chosen, *losses))
    return Conversion(stale, dict(enumerate(staleness.alone)), rules, staleness)
