"""The fields of sliding windows."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from megatron_ladder.errors import UserError
from megatron_ladder.fields.chosen_layers import chosen_layers


def layer_windows(model: Any) -> tuple[int | None, ...]:
    """Each layer's window in tokens, first to last; None: the layer attends to all tokens.

    Args:
        model: a `ModelConfig`.

    Raises:
        UserError: `sliding_window_layers` names a layer that does not exist, or there is no window.
    """
    if model.sliding_window_layers is None:
        return (model.sliding_window,) * model.num_layers
    if model.sliding_window is None:
        raise UserError(
            "model.sliding_window_layers is set but model.sliding_window is not: set it, or leave "
            "sliding_window_layers out"
        )
    chosen = chosen_layers("sliding_window_layers", model.sliding_window_layers, model.num_layers)
    return tuple(model.sliding_window if i in chosen else None for i in range(model.num_layers))


def attention_length(model: Any, lengths: Sequence[float]) -> float:
    """For FLOPs: the length of sequences whose full attention takes as long a token.

    Full causal attention of n tokens has n^2 / 2 scores; a window of W tokens leaves n W - W^2 / 2 of them.
    So without windows it is the sum of n^2 over the sum of n: of sequences of one length that length.

    Args:
        model: a `ModelConfig`.
        lengths: tokens of each sequence; where documents are apart, of each document.

    Returns:
        Tokens, a mean over all tokens and layers.
    """
    scores = 0.0
    for window, layers in Counter(layer_windows(model)).items():
        seen = lengths if window is None else [min(window, n) for n in lengths]
        scores += layers * sum(w * (2 * n - w) for w, n in zip(seen, lengths, strict=True))
    return scores / (model.num_layers * sum(lengths))
