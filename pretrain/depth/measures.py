"""How much each layer adds to the residual stream, and what changes without it (arXiv 2505.13898)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from megatron_ladder.hf.modeling_ladder import LadderForCausalLM
from pretrain.depth.states import run


@dataclass(frozen=True)
class Contributions:
    """By layer, the mean over tokens. h: the stream before the layer; a, m: what its attention and MLP add.

    Each is compared with what it is added to, which in a ladder layer is not what it was computed
    from. In a parallel layer attention and MLP are both added to h.
    """

    attention: list[float]
    """|a| / |h|."""
    mlp: list[float]
    """|m| / |h + a|; |m| / |h| in a parallel layer."""
    layer: list[float]
    """|a + m| / |h|."""
    attention_cosine: list[float]
    """Of the angle between a and h."""
    mlp_cosine: list[float]
    """Of the angle between m and h + a; and h in a parallel layer."""
    layer_cosine: list[float]
    """Of the angle between a + m and h."""


@dataclass(frozen=True)
class SkipEffects:
    """What skipping layer s, the first index, changes."""

    later_max: list[list[float | None]]
    """[s][l]: the change in what layer l adds, over what it adds, the largest of all tokens; None where
    l does not follow s."""
    later_mean: list[list[float | None]]
    """The same, the mean over tokens."""
    output_max: list[float]
    """L2 distance of the output probabilities, the largest of all tokens."""
    output_mean: list[float]
    """The same, the mean over tokens."""
    loss_increase: list[float]
    """Of the cross-entropy, nats a token."""


def measure_contributions(model: LadderForCausalLM, sequences: Tensor) -> Contributions:
    """Means over all tokens of [count, length + 1] token ids; the last of each is not read."""
    sums: dict[str, Any] = dict.fromkeys(Contributions.__dataclass_fields__, 0.0)
    both_to_h = torch.tensor(
        [layer.residual == "parallel" for layer in model.model.layers], device=sequences.device
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
    """|x| / |to| over the last axis; 0 where both are zero."""
    return x.norm(dim=-1) / to.norm(dim=-1).clamp_min(torch.finfo(to.dtype).tiny)


def measure_skips(model: LadderForCausalLM, sequences: Tensor) -> tuple[SkipEffects, SkipEffects]:
    """Skips each layer once.

    Args:
        sequences: [count, length + 1] token ids, on the model's device.

    Returns:
        Skipped at all positions and measured at all; skipped in the first half of each sequence and
        measured in the second, where only what later positions read of the layer is missing.
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
    """What SkipEffects is made of, over the sequences so far."""

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
        """One sequence: change [layers, length], distance and loss [length]."""
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
