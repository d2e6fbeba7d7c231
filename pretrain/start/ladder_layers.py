"""Which layers of a model are made ladder layers: `--ladder-layers` of `train` and `import`."""

from dataclasses import replace
from pathlib import Path

from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError

Layers = int | tuple[int, ...] | None
"""As ModelConfig.ladder_layers has them: the last N, a list from 0, or None for all."""


def with_ladder_layers(model: ModelConfig, given: str, measured: Path | None) -> ModelConfig:
    """A standard model whose layers are made ladder layers as `given`; no weight is changed.

    Args:
        given: `last:N`, `all`, layers from 0 (`0,2,5`), or `auto:N`: the N that stand it best.
        measured: the run whose layers were measured, for `auto`.

    Raises:
        UserError: it is none of these, nothing was measured, or the model is not standard.
    """
    layers = auto_layers(given, measured) if is_auto(given) else parse_layers(given)
    if set(model.layer_residuals()) != {"standard"}:
        raise UserError(
            f"--ladder-layers {given}: the model's residual is {model.residual} already; a standard one "
            "can be made ladder"
        )
    return replace(model, residual="ladder", ladder_layers=layers)


def is_auto(given: str) -> bool:
    return given.startswith("auto")


def auto_count(given: str) -> int:
    """The N of `auto:N`. Raises UserError."""
    number = given.removeprefix("auto:")
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"--ladder-layers {given}: give auto:N, the number of layers to choose")
    return int(number)


def auto_layers(given: str, measured: Path | None) -> tuple[int, ...]:
    """The layers that `auto:N` chooses by what was measured of a run. Raises UserError."""
    from pretrain.model.staleness import saved_staleness  # brings torch
    from pretrain.run.folder import find_checkpoint

    count = auto_count(given)
    if measured is None:
        raise UserError(
            f"--ladder-layers {given} chooses among the layers of a model that exists: give "
            "--init-from RUN"
        )
    return saved_staleness(find_checkpoint(measured).parents[1]).choose(count)


def parse_layers(given: str) -> Layers:
    """`last:N`, `all`, or layers from 0. Raises UserError."""
    try:
        if given == "all":
            return None
        if given.startswith("last:"):
            return int(given.removeprefix("last:"))
        return tuple(int(part) for part in given.split(","))
    except ValueError:
        raise UserError(
            f"--ladder-layers {given}: give last:N, all, auto:N, or layers from 0 such as 4,5,7"
        ) from None
