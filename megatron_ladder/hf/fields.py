"""Whether the fields of a model's config.json have types and sizes that a model can have.

transformers does not ask: it makes a list of `num_hidden_layers` entries, and `num_labels` names.
"""

import math
from pathlib import Path
from typing import Any

from megatron_ladder.config import MOST_LAYERS, MOST_SIZE
from megatron_ladder.errors import UserError
from megatron_ladder.json_files import is_whole, short

# Each may be absent. Where null is allowed, it means the same.
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "side_reduction",
)
SIZES_OR_NULL = ("num_key_value_heads", "head_dim")
# Of experts. As many modules are made as there are.
EXPERT_SIZES = (
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "decoder_sparse_step",
)
EXPERT_COUNTS = ("num_experts", "num_local_experts")
MOST_EXPERTS = 10_000
COUNTS_OR_NULL = ("sliding_window", "max_window_layers", "original_max_position_embeddings")
NUMBERS = ("rms_norm_eps", "initializer_range", "router_jitter_noise")
NUMBERS_OR_NULL = ("rope_theta", "partial_rotary_factor", "attention_dropout")
ROPE_NUMBERS = ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
MOST_LABELS = 100_000


def check_fields(values: dict[str, Any], path: Path) -> None:
    """Refuses a configuration with values that are no model's. It has not been given to transformers yet.

    Args:
        values: of config.json.
        path: of it, for messages.

    Raises:
        UserError: the first field that is wrong.
    """

    def need(right: bool, name: str, value: Any, wanted: str) -> None:
        if not right:
            raise UserError(f"{path}: {name} is {short(value)}: it must be {wanted}")

    def number(name: str, value: Any) -> None:
        right = type(value) in (int, float) and math.isfinite(value)
        need(right, name, value, "a number")

    for name in (*SIZES, "max_position_embeddings", *SIZES_OR_NULL, *COUNTS_OR_NULL):
        least = 0 if name in COUNTS_OR_NULL else 1
        value = values.get(name)
        if name in values and not (value is None and name in (*SIZES_OR_NULL, *COUNTS_OR_NULL)):
            wanted = f"a whole number from {least} to {MOST_SIZE:,}"
            need(is_whole(value, least, MOST_SIZE), name, value, wanted)
    of_experts = [(name, MOST_SIZE) for name in EXPERT_SIZES]
    of_experts += [(name, MOST_EXPERTS) for name in EXPERT_COUNTS]
    for name, most in (
        ("num_hidden_layers", MOST_LAYERS),
        ("num_labels", MOST_LABELS),
        *((name, most) for name, most in of_experts if values.get(name) is not None),
    ):
        value = values.get(name, 1)
        need(is_whole(value, 1, most), name, value, f"a whole number from 1 to {most:,}")
    for name in (*NUMBERS, *NUMBERS_OR_NULL):
        if name in values and not (values[name] is None and name in NUMBERS_OR_NULL):
            number(name, values[name])
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name)
        need(rope is None or isinstance(rope, dict), name, rope, "an object")
        for key, value in (rope or {}).items():
            if key in ("rope_type", "type"):
                need(isinstance(value, str), f"{name}.{key}", value, "a string")
            elif key == "original_max_position_embeddings" and value is not None:
                wanted = f"a whole number from 1 to {MOST_SIZE:,}"
                need(is_whole(value, 1, MOST_SIZE), f"{name}.{key}", value, wanted)
            elif key in (*ROPE_NUMBERS, *NUMBERS_OR_NULL) and value is not None:
                number(f"{name}.{key}", value)
    for name in IDS:
        value = values.get(name)
        ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
        right = all(i is None or is_whole(i, -1, MOST_SIZE) for i in ids)
        need(right, name, value, "a token id")
    for name in ("ladder_layers", "side_layers", "mlp_only_layers"):
        layers = values.get(name)
        some = layers if isinstance(layers, list) else [0 if layers is None else layers]
        right = all(is_whole(layer, 0, MOST_LAYERS) for layer in some)
        need(right, name, layers, "null, a number or a list of layers")
    types = values.get("layer_types")
    right = types is None or (isinstance(types, list) and all(isinstance(t, str) for t in types))
    need(right, "layer_types", types, "a list of names")
    for name in ("model_type", "residual", "residual_scaling", "hidden_act", "scoring_func"):
        value = values.get(name, "")
        need(isinstance(value, str), name, value, "a string")
    for name in (
        "tie_word_embeddings",
        "use_sliding_window",
        "attention_bias",
        "mlp_bias",
        "qkv_bias",
        "layer_norms",
        "norm_topk_prob",
        "expert_bias",
    ):
        value = values.get(name, False)
        need(value is None or type(value) is bool, name, value, "true or false")
