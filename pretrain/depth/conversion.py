"""The loss with the residual of single layers changed: from standard to ladder, or back to standard."""

from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from megatron_ladder.hf.modeling_ladder import LadderForCausalLM
from pretrain.model.staleness import Staleness, loss_with_ladder_layers, measure_staleness


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
    """The residual that the changed layers get: "ladder" or "standard"."""
    alone: dict[int, float]
    """For each layer that can be changed, the loss when only this layer is changed."""
    rules: list[Rule]
    staleness: Staleness | None
    """What `auto:N` needs; None for a model that has ladder layers already."""


def measure_conversion(model: LadderForCausalLM, sequences: Tensor, data: str) -> Conversion | None:
    """Changes one layer at a time and measures the loss; None for a parallel model.

    The layers of a parallel model have other weights, so they cannot be changed. The layers of a standard
    model are made ladder layers. In a model with ladder layers, these are made standard: the model was
    trained with the older state, so for it the standard state is the change.

    Args:
        sequences: int64 [count, length + 1], token ids, on the model's device.
        data: where the sequences come from, in words.
    """
    residuals = [layer.residual for layer in model.model.layers]
    if "parallel" in residuals:
        return None
    ladder = [i for i, residual in enumerate(residuals) if residual == "ladder"]
    if ladder:
        alone = {
            layer: loss_with_ladder_layers(model, sequences, [i for i in ladder if i != layer])
            for layer in tqdm(ladder, "made standard", disable=None)
        }
        return Conversion("standard", alone, [], None)
    staleness = measure_staleness(model, sequences, data)
    layers = len(residuals)
    counts = sorted({max(1, round(layers * share)) for share in (0.25, 0.5, 0.75)})
    rules = []
    for count in tqdm(counts, "auto:N and last N", disable=None):
        chosen = staleness.choose(count)
        last = range(layers - count, layers)
        losses = [loss_with_ladder_layers(model, sequences, rule) for rule in (chosen, last)]
        rules.append(Rule(count, chosen, *losses))
    return Conversion("ladder", dict(enumerate(staleness.alone)), rules, staleness)
