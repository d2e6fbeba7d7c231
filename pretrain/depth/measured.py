"""All measurements of one model, and tables of them."""

from dataclasses import dataclass

from torch import Tensor

from megatron_ladder.config import PARALLEL
from pretrain.convert.plain_model import PlainModel
from pretrain.depth.conversion import Conversion, measure_conversion
from pretrain.depth.growth import Growth, measure_growth
from pretrain.depth.measures import (
    Contributions,
    SkipEffects,
    measure_contributions,
    measure_skips,
)
from pretrain.model.staleness import mean_loss


@dataclass(frozen=True)
class Measured:
    """All measurements of one model, on the same sequences. Losses are in nats a token."""

    label: str
    path: str
    parameters: int
    residual: list[str]
    """The residual of each layer: standard, ladder, parallel or parallel-ladder."""
    loss: float
    contributions: Contributions
    growth: Growth
    skipped: SkipEffects
    """Layers are skipped at all positions; effects are measured at all positions."""
    skipped_before: SkipEffects
    """Layers are skipped in the first half of each sequence; effects are measured in the second half."""
    conversion: Conversion


def measure(plain: PlainModel, label: str, sequences: Tensor, data: str) -> Measured:
    """Makes all measurements of a model. The model is not changed.

    Args:
        plain: the model.
        label: its name in the report.
        sequences: int64 [count, length + 1], token ids, on any device.
        data: where the sequences come from, in words.
    """
    model, sequences = plain.model, sequences.to(plain.device)
    contributions = measure_contributions(model, sequences)
    skipped, skipped_before = measure_skips(model, sequences)
    return Measured(
        label=label,
        path=str(plain.path),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        residual=[str(layer.residual) for layer in model.model.layers],
        loss=mean_loss(model, sequences),
        contributions=contributions,
        growth=measure_growth(model, sequences),
        skipped=skipped,
        skipped_before=skipped_before,
        conversion=measure_conversion(model, sequences, data),
    )


def layer_table(model: Measured) -> list[list[str]]:
    """The table of layers: a line of column names, and a line for each layer."""
    shares, all_, before = model.contributions, model.skipped, model.skipped_before
    lines = [
        ["layer", "residual", "|a|/|h|", "|m|/|h+a|", "|a+m|/|h|", "cos a", "cos m", "cos a+m"]
    ]
    lines[0] += ["skipped: loss", "output", "skipped earlier: loss", "output"]
    lines[0].append(f"made {model.conversion.to}: loss")
    if PARALLEL.issuperset(model.residual):
        lines[0][3] = "|m|/|h|"
    for i, residual in enumerate(model.residual):
        line = [str(i), residual]
        line += [f"{v[i]:.3f}" for v in (shares.attention, shares.mlp, shares.layer)]
        cosines = (shares.attention_cosine, shares.mlp_cosine, shares.layer_cosine)
        line += [f"{v[i]:+.3f}" for v in cosines]
        for effects in (all_, before):
            line += [f"{effects.loss_increase[i]:+.4f}", f"{effects.output_mean[i]:.4f}"]
        loss = model.conversion.alone.get(i)
        line.append("-" if loss is None else f"{loss - model.loss:+.4f}")
        lines.append(line)
    return lines


def growth_in_words(model: Measured) -> str:
    """How much the stream has grown after the last layer, and what is predicted."""
    found = model.growth
    return (
        f"after {len(model.residual)} layers the residual stream is {found.measured[-1]:.4g} times the "
        f"embedding; from the sizes alone, {found.independent[-1]:.4g} if what is added is independent, "
        f"{found.aligned[-1]:.4g} if it all points the same way"
    )


def rule_table(model: Measured) -> list[list[str]]:
    """The table of rules: column names, then a line for each number of ladder layers; [] without rules."""
    if not model.conversion.rules:
        return []
    lines = [["ladder layers N", "auto:N: loss", "last N: loss", "layers of auto:N"]]
    for rule in model.conversion.rules:
        losses = [f"{loss - model.loss:+.4f}" for loss in (rule.chosen_loss, rule.last_loss)]
        lines.append([str(rule.count), *losses, " ".join(map(str, rule.chosen))])
    return lines


def as_text(lines: list[list[str]]) -> str:
    """A table as text for a terminal, with columns aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
