"""What each layer costs with its residual changed: standard to ladder, and ladder to standard."""

from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from megatron_ladder.hf.modeling_ladder import LadderForCausalLM
from pretrain.model.staleness import Staleness, loss_with_ladder_layers, measure_staleness


@dataclass(frozen=True)
class Rule:
    """As many ladder layers, chosen in two ways. Losses in nats a token."""

    count: int
    chosen: tuple[int, ...]
    """auto:N: those that stand it best alone."""
    chosen_loss: float
    last_loss: float
    """The last N are ladder layers (arXiv 2501.06589, section 4.2)."""


@dataclass(frozen=True)
class Conversion:
    """Losses in nats a token; the weights stay as they are."""

    to: str
    """The residual that layers are given: "ladder" or "standard"."""
    alone: dict[int, float]
    """By layer, the loss when this one alone is changed."""
    rules: list[Rule]
    staleness: Staleness | None
    """Of a standard model, for `auto:N`."""


def measure_conversion(model: LadderForCausalLM, sequences: Tensor, data: str) -> Conversion | None:
    """Changes each layer once; None for a parallel model, whose layers have other weights.

    A standard model's layers are made ladder layers. Of a model with ladder layers, these are made
    standard: it has learned with the older state, so that is the change for it.

    Args:
        sequences: [count, length + 1] token ids, on the model's device.
        data: where they come from, in words.
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
