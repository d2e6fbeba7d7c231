"""How much each layer adds to the residual stream, and what changes without it (arXiv 2505.13898)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from megatron_ladder.config import PARALLEL
from megatron_ladder.hf.modelling.modeling_ladder import LadderForCausalLM
from pretrain.depth.states import run


@dataclass(frozen=True)
class Contributions:
    """What each layer adds, as means over tokens; each list has one figure a layer.

    h is the residual stream before the layer; a and m are what its attention and its MLP add. Each is
    compared with the stream that it is added to; a ladder layer computes it from an older state. In a
    parallel layer, a and m are both added to h.
    """

    attention: list[float]
    """|a| / |h|."""
    mlp: list[float]
    """|m| / |h + a|; |m| / |h| in a parallel layer."""
    layer: list[float]
    """|a + m| / |h|."""
    attention_cosine: list[float]
    """The cosine of the angle between a and h."""
    mlp_cosine: list[float]
    """The cosine of the angle between m and h + a; between m and h in a parallel layer."""
    layer_cosine: list[float]
    """The cosine of the angle between a + m and h."""


@dataclass(frozen=True)
class SkipEffects:
    """What changes when layer s is skipped; s is the first index."""

    later_max: list[list[float | None]]
    """[s][l]: the size of the change in what layer l adds, divided by the size of what it adds; the maximum
    over tokens. None where l does not follow s."""
    later_mean: list[list[float | None]]
    """As later_max, but the mean over tokens."""
    output_max: list[float]
    """[s]: the L2 distance between the output probabilities, the maximum over tokens."""
    output_mean: list[float]
    """As output_max, but the mean over tokens."""
    loss_increase: list[float]
    """[s]: the increase of the cross-entropy, in nats a token."""


def measure_contributions(model: LadderForCausalLM, sequences: Tensor) -> Contributions:
    """Measures what each layer adds, over all tokens.

    Args:
        sequences: int64 [count, length + 1], token ids, on the model's device; the last of each sequence
            is not read.
    """
    sums: dict[str, Any] = dict.fromkeys(Contributions.__dataclass_fields__, 0.0)
    both_to_h = torch.tensor(
        [layer.residual in PARALLEL for layer in model.model.layers], device=sequences.device
    )
    for sequence in tqdm(sequences, "contributions", disable=None):
        seen = run(model, sequence[:-1])
        h = seen.states[:-1]
        before_mlp = torch.where(both_to_h[:, None, None], h, h + seen.attention)
        for name, added, to in (
            ("attention", seen.attention, h),
            ("mlp", seen.mlp, before_mlp),
            ("layer", seen.layer, h),
        ):
            sums[name] += relative(added, to).sum(1, dtype=torch.float64)
            sums[f"{name}_cosine"] += F.cosine_similarity(added, to, dim=-1).sum(
                1, dtype=torch.float64
            )
    tokens = sequences[:, 1:].numel()
    return Contributions(**{name: (total / tokens).tolist() for name, total in sums.items()})


def relative(x: Tensor, to: Tensor) -> Tensor:
    """|x| / |to|, norms over the last axis; 0 where both are zero."""
    return x.norm(dim=-1) / to.norm(dim=-1).clamp_min(torch.finfo(to.dtype).tiny)


def measure_skips(model: LadderForCausalLM, sequences: Tensor) -> tuple[SkipEffects, SkipEffects]:
    """Skips one layer at a time and measures what changes, in two ways.

    Args:
        sequences: int64 [count, length + 1], token ids, on the model's device.

    Returns:
        The effects with layers skipped at all positions, measured at all positions; and the effects with
        layers skipped in the first half of each sequence, measured in the second half. In the second half
        nothing is skipped; only what later layers' attention reads of the skipped positions differs.
    """
    layers = len(model.model.layers)
    length = sequences.shape[1] - 1
    first, second = slice(0, length // 2), slice(length // 2, length)
    variants = [_Sums(layers, slice(None), slice(None)), _Sums(layers, first, second)]
    with tqdm(total=len(sequences) * layers, desc="skipped layers", disable=None) as bar:
        for sequence in sequences:
            whole = run(model, sequence[:-1])
            for skip in range(layers):
                for sums in variants:
                    without = run(model, sequence[:-1], skip, sums.skipped)
                    change = relative(whole.layer - without.layer, whole.layer)
                    distance = (whole.logits.softmax(-1) - without.logits.softmax(-1)).norm(dim=-1)
                    losses = [
                        F.cross_entropy(logits, sequence[1:], reduction="none")
                        for logits in (without.logits, whole.logits)
                    ]
                    sums.add(skip, change, distance, losses[0] - losses[1])
                bar.update()
    return variants[0].effects(), variants[1].effects()


class _Sums:
    """The sums and maxima over the sequences so far, from which SkipEffects is made."""

    def __init__(self, layers: int, skipped: slice, measured: slice) -> None:
        self.skipped = skipped
        self.measured = measured
        self.tokens = 0
        self.later_max = torch.zeros(layers, layers)
        self.later_sum = torch.zeros(layers, layers, dtype=torch.float64)
        self.output_max = torch.zeros(layers)
        self.output_sum = torch.zeros(layers, dtype=torch.float64)
        self.loss_sum = torch.zeros(layers, dtype=torch.float64)

    def add(self, skip: int, change: Tensor, distance: Tensor, loss: Tensor) -> None:
        """Adds one sequence, with layer `skip` skipped.

        Args:
            change: [layers, length], the relative change in what each layer adds.
            distance: [length], between the output probabilities.
            loss: [length], the increase of the cross-entropy.
        """
        change, distance = change[:, self.measured].cpu(), distance[self.measured].cpu()
        self.later_max[skip] = torch.maximum(self.later_max[skip], change.amax(1))
        self.later_sum[skip] += change.sum(1, dtype=torch.float64)
        self.output_max[skip] = torch.maximum(self.output_max[skip], distance.amax())
        self.output_sum[skip] += distance.sum(dtype=torch.float64)
        self.loss_sum[skip] += loss[self.measured].cpu().sum(dtype=torch.float64)
        if skip == 0:
            self.tokens += len(distance)

    def effects(self) -> SkipEffects:
        return SkipEffects(
            later_max=_later(self.later_max),
            later_mean=_later(self.later_sum / self.tokens),
            output_max=self.output_max.tolist(),
            output_mean=(self.output_sum / self.tokens).tolist(),
            loss_increase=(self.loss_sum / self.tokens).tolist(),
        )


def _later(matrix: Tensor) -> list[list[float | None]]:
    return [
        [value if later > skip else None for later, value in enumerate(row)]
        for skip, row in enumerate(matrix.tolist())
    ]
