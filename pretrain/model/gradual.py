"""Turns ladder layers on one after another, so that a model trained without them can adapt to them."""

from typing import Any

from megatron_ladder.config import FRESH, STALE
from pretrain.config.train import TrainConfig


def use_ladder_layers(model: list[Any], config: TrainConfig, step: int | None) -> None:
    """Sets every layer of the model to a ladder layer or not, as it must be at a step.

    Within `adapt.gradual_steps` steps the ladder layers are turned on one by one, at equal distances. The
    last layer of the model is the first, because few other layers depend on what it reads. The step alone
    decides which layers are on, so a resumed run continues as before. Without `adapt.gradual_steps` the
    model is left as it is.

    Args:
        model: this rank's chunks, built with all of the run's ladder layers.
        step: counted from 1. None turns all on, as in the model at the end of the run.
    """
    if not config.adapt.gradual_steps:
        return
    on, kind = set(ladder_layers_at(config, step)), config.model.residual
    for chunk in model:
        for layer in chunk.module.decoder.layers:
            layer.residual = kind if layer.layer_number - 1 in on else FRESH[kind]


def ladder_layers_at(config: TrainConfig, step: int | None) -> list[int]:
    """The layers that are ladder layers at a step, numbered from 0, in the order they are turned on."""
    residuals = config.model.layer_residuals()
    layers = [i for i, residual in enumerate(residuals) if residual in STALE][::-1]
    if step is None:
        return layers
    # One is on from the first step, all from step `gradual_steps` on.
    steps = config.adapt.gradual_steps
    return layers[: -(-len(layers) * min(step, steps) // steps)]
