"""Which layers of a model are made ladder layers: `--ladder-layers` of `train` and `import`."""

from dataclasses import replace
from pathlib import Path

from megatron_ladder.config import FRESH, ModelConfig
from megatron_ladder.errors import UserError

Layers = int | tuple[int, ...] | None
"""A value for ModelConfig.ladder_layers: the last N, layer numbers from 0, or None for all layers."""


def with_ladder_layers(model: ModelConfig, given: str, measured: Path | None) -> ModelConfig:
    """A standard or parallel model with some layers made ladder layers; no weight is changed.

    Args:
        given: `last:N`, `all`, layer numbers from 0 (`0,2,5`), or `auto:N`: the N layers whose change
            alone raises the loss least.
        measured: for `auto`, the run whose layers were measured.

    Raises:
        UserError: `given` has none of these forms, nothing was measured, or the model is of another kind.
    """
    layers = auto_layers(given, measured) if is_auto(given) else parse_layers(given)
    for stale, fresh in FRESH.items():
        if set(model.layer_residuals()) == {fresh}:
            return replace(model, residual=stale, ladder_layers=layers)
    raise UserError(
        f"--ladder-layers {given}: the model's residual is {model.residual} already; only the layers of a "
        "standard or a parallel model can be made ladder layers"
    )


def is_auto(given: str) -> bool:
    return given.startswith("auto")


def auto_count(given: str) -> int:
    """The N of `auto:N`. Raises UserError."""
    number = given.removeprefix("auto:")
    if not number.isdecimal() or int(number) < 1:
        raise UserError(
            f"--ladder-layers {given}: give auto:N, where N is the number of layers to choose"
        )
    return int(number)


def auto_layers(given: str, measured: Path | None) -> tuple[int, ...]:
    """The layers that `auto:N` chooses, by the measurements saved in a run's folder.

    Raises:
        UserError: N is no positive number or too large, no run is given, or nothing was measured.
    """
    from pretrain.model.staleness import saved_staleness  # here, because it imports torch
    from pretrain.run.folder import find_checkpoint

    count = auto_count(given)
    if measured is None:
        raise UserError(
            f"--ladder-layers {given} chooses among the layers of an existing model: give "
            "--init-from RUN"
        )
    return saved_staleness(find_checkpoint(measured).parents[1]).choose(count)


def parse_layers(given: str) -> Layers:
    """Reads `last:N`, `all`, or layer numbers from 0. Raises UserError on anything else."""
    try:
        if given == "all":
            return None
        if given.startswith("last:"):
            return int(given.removeprefix("last:"))
        return tuple(int(part) for part in given.split(","))
    except ValueError:
        raise UserError(
            f"--ladder-layers {given}: give last:N, all, auto:N, or layer numbers from 0 such as 4,5,7"
        ) from None
