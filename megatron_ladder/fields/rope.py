"""The fields of RoPE's scaling."""

import math
from typing import Any

from megatron_ladder.errors import UserError


def check_rope(model: Any) -> None:
    """Checks the fields of RoPE's scaling. Raises UserError when they do not go together.

    Args:
        model: a `ModelConfig`.
    """
    kind, factor = model.rope_scaling_type, model.rope_scaling_factor
    fast, slow = model.rope_beta_fast, model.rope_beta_slow
    if kind == "yarn":
        if factor is None or factor < 1:
            raise UserError(
                f"model.rope_scaling_factor is {factor}: model.rope_scaling_type yarn needs one of 1 or "
                "more, the new context over the old one"
            )
        if not 0 < slow < fast < math.inf:
            raise UserError(
                f"model.rope_beta_slow is {slow} and model.rope_beta_fast {fast}: they must be above 0, "
                "and rope_beta_slow the smaller"
            )
        attention = model.rope_attention_factor
        if attention is not None and not 0 < attention < math.inf:
            raise UserError(
                f"model.rope_attention_factor is {attention}: it must be above 0; leave it out for YaRN's"
            )
        if model.rotary_base <= 1:
            raise UserError(
                f"model.rotary_base is {model.rotary_base}: model.rope_scaling_type yarn needs one above 1"
            )
        return
    if (fast, slow, model.rope_attention_factor) != (32, 1, None):
        raise UserError(
            "model.rope_beta_fast, rope_beta_slow and rope_attention_factor go with "
            f"model.rope_scaling_type yarn: it is {kind}"
        )
    if model.rope_original_max_position_embeddings is not None and (
        factor is None or kind != "llama3"
    ):
        raise UserError(
            "model.rope_original_max_position_embeddings goes with a model.rope_scaling_factor and "
            "model.rope_scaling_type llama3 or yarn"
        )
