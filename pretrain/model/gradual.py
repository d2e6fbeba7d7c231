"""Ladder layers turned on one after another, so that a model that was not trained so can follow."""

from typing import Any

from pretrain.config.train import TrainConfig


def use_ladder_layers(model: list[Any], config: TrainConfig, step: int | None) -> None:
    """Makes the layers that are ladder layers at a step ladder, the others of the model standard.

    Over `adapt.gradual_steps` steps the ladder layers are turned on at equal distances, the last layer
    of the model first: what a late layer reads matters to few others. A function of the step
    alone, so a resumed run goes on as it was.

    Args:
        model: chunks built with all of the run's ladder layers.
        step: from 1; None: all are on, as in the model that the run is to become.
    """
    if not config.adapt.gradual_steps:
        return
    on = set(ladder_layers_at(config, step))
    for chunk in model:
        for layer in chunk.module.decoder.layers:
            layer.residual = "ladder" if layer.layer_number - 1 in on else "standard"


def ladder_layers_at(config: TrainConfig, step: int | None) -> list[int]:
    """The ladder layers of a step, numbered from 0, the first to be turned on first."""
    residuals = config.model.layer_residuals()
    layers = [i for i, residual in enumerate(residuals) if residual == "ladder"][::-1]
    if step is None:
        return layers
    # One is on from the first step, all from step `gradual_steps` on.
    steps = config.adapt.gradual_steps
    return layers[: -(-len(layers) * min(step, steps) // steps)]
