"""The side network of ladder side-tuning (LST, arXiv 2206.06522, section 3.2), by its numbers."""

from dataclasses import dataclass, replace
from typing import Literal

from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError

TEMPERATURE = 0.1
"""T of a gate mu = sigmoid(alpha / T). alpha starts at 0."""


@dataclass(frozen=True)
class SideConfig:
    """A small network beside a model that is not trained (its backbone): ladder side-tuning.

    Each of its blocks reads the state after one of the backbone's layers.
    """

    reduction: int | None = None
    """Widths of the side network are the model's, divided by this: of states, MLP and heads. None: there
    is no side network, and the model is trained."""
    dropped_layers: int | tuple[int, ...] | None = None
    """Layers without a block of the side network: every N-th (0, N, 2N, ...), or a list, from 0."""
    start: Literal["fisher", "magnitude", "random"] = "fisher"
    """The first weights of the blocks: the backbone's, pruned by the squares of their gradients (one
    global batch, backward through the backbone) or by their magnitude; or random."""

    @property
    def is_on(self) -> bool:
        """Whether there is a side network."""
        return self.reduction is not None

    def kept_layers(self, num_layers: int) -> tuple[int, ...]:
        """The backbone's layers that have a block of the side network, from 0, ascending."""
        dropped = self.dropped_layers
        if isinstance(dropped, int):
            return tuple(i for i in range(num_layers) if i % dropped)
        return tuple(i for i in range(num_layers) if i not in (dropped or ()))

    def model(self, backbone: ModelConfig) -> ModelConfig:
        """The model that has the side network's blocks, with as many layers as the backbone.

        It has as many heads as the backbone, with fewer channels. Its residual is standard.
        """
        assert self.reduction is not None
        return replace(
            backbone,
            hidden_size=backbone.hidden_size // self.reduction,
            ffn_hidden_size=backbone.ffn_hidden_size // self.reduction,
            kv_channels=backbone.head_dim // self.reduction,
            residual="standard",
            ladder_layers=None,
        )

    def backbone(self, model: ModelConfig) -> ModelConfig:
        """The model as it runs beside a side network: without dropout, as it is not trained."""
        return replace(model, hidden_dropout=0.0, attention_dropout=0.0)

    def block_parameters(self, backbone: ModelConfig) -> int:
        """Number of parameters of one block, without its gate and its down-projection."""
        small = self.model(backbone)
        return (small.num_parameters(embeddings=False) - small.hidden_size) // small.num_layers

    def num_parameters(self, backbone: ModelConfig) -> int:
        """Number of parameters of the side network: all that is trained."""
        kept = len(self.kept_layers(backbone.num_layers))
        projection = backbone.hidden_size * self.model(backbone).hidden_size
        return kept * (self.block_parameters(backbone) + projection + 1) + 2 * projection


def check_side(side: SideConfig, model: ModelConfig) -> None:
    """Checks that a model can have the side network.

    Raises:
        UserError: what does not fit, and what to give.
    """
    if not side.is_on:
        if side != SideConfig():
            raise UserError(
                "side.dropped_layers and side.start are of a side network, and there is none: give "
                "--preset side-tune, or side.reduction"
            )
        return
    assert side.reduction is not None
    if side.reduction < 1:
        raise UserError(f"side.reduction is {side.reduction}: it must be at least 1")
    for name, size in (
        ("model.hidden_size", model.hidden_size),
        ("model.ffn_hidden_size", model.ffn_hidden_size),
        ("the channels of a head (model.kv_channels),", model.head_dim),
    ):
        if size % side.reduction:
            raise UserError(
                f"side.reduction {side.reduction} does not divide {name} {size}: give a divisor of it"
            )
    if model.head_dim // side.reduction % 2:
        raise UserError(
            f"side.reduction {side.reduction} leaves {model.head_dim // side.reduction} of the "
            f"{model.head_dim} channels of a head, and RoPE needs an even number: give a smaller one"
        )
    dropped = side.dropped_layers
    if isinstance(dropped, int) and dropped < 2:
        raise UserError(
            f"side.dropped_layers {dropped}: every N-th layer means an N of 2 or more, or give a list"
        )
    if isinstance(dropped, tuple):
        wrong = sorted(i for i in dropped if not 0 <= i < model.num_layers)
        if wrong or len(set(dropped)) < len(dropped):
            raise UserError(
                f"side.dropped_layers {list(dropped)}: layers are numbered 0 to {model.num_layers - 1}, "
                "each at most once"
            )
    if model.residual in ("desync", "no-comm"):
        raise UserError(
            f"side.reduction: a {model.residual} model can have no side network, because its ranks do not "
            "share their states: take a model of another kind"
        )
    if model.residual_scaling != "none" or not model.layer_norms:
        raise UserError(
            "side.reduction: a model with scaled outputs or without norms can have no side network yet: "
            "take another one"
        )
    if model.experts.num_moe_experts is not None:
        raise UserError(
            "side.reduction: a model with experts can have no side network yet: take a dense model"
        )
    if model.sliding_window is not None:
        raise UserError(
            "side.reduction: a model with a sliding window can have no side network yet: take a model "
            "whose layers attend to all tokens"
        )
