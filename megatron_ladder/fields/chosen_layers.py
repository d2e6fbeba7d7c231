"""Fields that choose some of a model's layers."""

from collections.abc import Sequence

from megatron_ladder.errors import UserError


def chosen_layers(name: str, value: int | Sequence[int], num_layers: int) -> set[int]:
    """The layers that an option chooses, numbered from 0.

    Args:
        name: the option, for messages.
        value: an int N, the last N layers; or a list of layers.
        num_layers: the layers of the model.

    Raises:
        UserError: there is no such layer, or one is named twice.
    """
    if isinstance(value, int):
        if not 0 <= value <= num_layers:
            raise UserError(
                f"model.{name} {value}: the last N of {num_layers} layers means 0 to {num_layers}"
            )
        return set(range(num_layers - value, num_layers))
    chosen = set(value)
    if len(chosen) != len(value) or any(not 0 <= i < num_layers for i in chosen):
        raise UserError(
            f"model.{name} {list(value)}: layers are numbered 0 to {num_layers - 1}, each at most once"
        )
    return chosen
