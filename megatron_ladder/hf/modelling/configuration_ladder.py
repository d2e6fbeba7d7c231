# SPDX-License-Identifier: Apache-2.0
"""Configuration of a Ladder Residual transformer (arXiv 2501.06589).

This file is copied into the folders of exported models. It imports only transformers.
"""

from typing import Any

from transformers import PreTrainedConfig

# The kinds with ladder layers, which read the state before the last, and the kind of their other layers.
LADDERS = {"ladder": "standard", "parallel-ladder": "parallel"}
# The kinds whose attention and MLP read one state, through one norm.
PARALLELS = ("parallel", "parallel-ladder")
RESIDUALS = ("standard", "ladder", "parallel", "parallel-ladder")
# How the router of a mixture of experts makes scores of its logits.
SCORES = ("softmax", "sigmoid")
# What outputs are multiplied by before they are added: this power of the number of attentions and MLPs, or
# learned numbers.
SCALINGS = {"none": 0.0, "1/n": -1.0, "1/sqrt-n": -0.5, "skipinit": None}


def ladder_layer_indices(
    residual: str, ladder_layers: int | list[int] | tuple[int, ...] | None, num_layers: int
) -> tuple[int, ...]:
    """The ladder layers, numbered from 0, ascending. Their sub-modules read the state before the last.

    Args:
        residual: one of RESIDUALS.
        ladder_layers: only with a kind of LADDERS: None (every layer), an int (the last N layers) or a list
            of layers. All other layers are standard, or parallel.
        num_layers: the number of layers in the model.

    Raises:
        ValueError: `residual` is unknown, `ladder_layers` is set with a kind that has no ladder layers, or
            a layer in it does not exist or is named twice.
    """
    if residual not in RESIDUALS:
        raise ValueError(f"residual is {residual!r}: choose one of {', '.join(RESIDUALS)}")
    if residual not in LADDERS:
        if ladder_layers is not None:
            raise ValueError(
                f"ladder_layers is set but residual is {residual!r}: set residual to "
                f"{' or '.join(map(repr, LADDERS))}, or leave ladder_layers out"
            )
        return ()
    if ladder_layers is None:
        return tuple(range(num_layers))
    if isinstance(ladder_layers, int):
        if not 0 <= ladder_layers <= num_layers:
            raise ValueError(
                f"ladder_layers {ladder_layers}: the last N of {num_layers} layers means "
                f"0 to {num_layers}"
            )
        return tuple(range(num_layers - ladder_layers, num_layers))
    chosen = sorted(ladder_layers)
    if len(set(chosen)) != len(chosen) or any(not 0 <= i < num_layers for i in chosen):
        raise ValueError(
            f"ladder_layers {list(ladder_layers)}: layers are numbered 0 to {num_layers - 1}, "
            "each at most once"
        )
    return tuple(chosen)


class LadderConfig(PreTrainedConfig):
    """The fields of Llama's configuration, and more.

    Args:
        residual: the state that a sub-module reads. "standard": the last state, as in Llama. "ladder": the
            state before it. "parallel": attention and MLP read the last state together, through one norm.
            "parallel-ladder": as parallel, of the state before the last layer's output.
        ladder_layers: with "ladder" or "parallel-ladder": None (every layer), an int (the last N layers) or
            a list of layers, numbered from 0. All other layers are standard, or parallel.
        residual_scaling: what the outputs of attention and MLP are multiplied by before they are added
            (arXiv 2510.03470). "none": they are added as they are. "1/n" and "1/sqrt-n": n is the number of
            attentions and MLPs, 2 num_hidden_layers. "skipinit": by learned numbers, two a layer; one for
            the sum of both in a parallel or parallel-ladder layer.
        layer_norms: attention and MLP read the state through norms. The norm after the last layer stays.
        qkv_bias: biases of queries, keys and values, as in Qwen2.
        qk_norm: RMSNorm of each head's query and key before RoPE, as in Qwen3.
        sliding_window: the tokens that a token attends to, itself and those just before it, as in Mistral.
            None: all.
        layer_types: of each layer "full_attention" or "sliding_attention", as in Qwen2. None: every layer
            has the window, if there is one.
        num_experts: of each layer that has experts in place of the MLP. None: there are no such layers.
        num_experts_per_tok: that each token goes to.
        moe_intermediate_size: the width of an expert. None: `intermediate_size`.
        shared_expert_intermediate_size: the width of one more expert, to which all tokens go. None: there
            is none.
        mlp_only_layers: with experts, the layers that have an MLP, numbered from 0.
        scoring_func: how the router's logits become scores: "softmax" or "sigmoid".
        norm_topk_prob: the weights of a token's experts sum to 1. sigmoid always has it.
        expert_bias: with sigmoid, experts are chosen by their scores plus a bias (arXiv 2408.15664).
        rope_parameters: transformers' dictionary, with the `rope_type` "default", "linear", "llama3" or
            "yarn". The older `rope_theta` and `rope_scaling` are read too.

    Raises:
        ValueError: the heads are not a multiple of the key/value heads, or `ladder_layers`, `residual`,
            `residual_scaling`, `layer_types` or a field of experts is wrong.
    """

    model_type = "ladder"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own name)

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-5,
        rope_parameters: dict[str, Any] | None = None,
        residual: str = "ladder",
        ladder_layers: int | list[int] | None = None,
        residual_scaling: str = "none",
        layer_norms: bool = True,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        sliding_window: int | None = None,
        layer_types: list[str] | None = None,
        num_experts: int | None = None,
        num_experts_per_tok: int = 2,
        moe_intermediate_size: int | None = None,
        shared_expert_intermediate_size: int | None = None,
        mlp_only_layers: list[int] | None = None,
        scoring_func: str = "softmax",
        norm_topk_prob: bool = True,
        expert_bias: bool = False,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        # A copy, because transformers adds rope_theta and rope_type to it.
        self.rope_parameters = dict(rope_parameters) if rope_parameters else None
        self.residual = residual
        self.ladder_layers = (
            list(ladder_layers) if isinstance(ladder_layers, list | tuple) else ladder_layers
        )
        self.residual_scaling = residual_scaling
        self.layer_norms = layer_norms
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.sliding_window = sliding_window
        # transformers' caches read it too, but only a list.
        if layer_types is not None:
            self.layer_types = list(layer_types)
        elif sliding_window is not None:
            self.layer_types = ["sliding_attention"] * num_hidden_layers
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.mlp_only_layers = list(mlp_only_layers) if mlp_only_layers else None
        self.scoring_func = scoring_func
        self.norm_topk_prob = norm_topk_prob
        self.expert_bias = expert_bias
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if residual_scaling not in SCALINGS:
            raise ValueError(
                f"residual_scaling is {residual_scaling!r}: choose one of {', '.join(SCALINGS)}"
            )
        self.ladder_layer_indices()  # refuses layers that do not exist
        self._check_experts()
        types = set(layer_types or ())
        if types - {"full_attention", "sliding_attention"} or (
            "sliding_attention" in types and sliding_window is None
        ):
            raise ValueError(
                f"layer_types names {sorted(types)}: full_attention is supported, and with a "
                "sliding_window sliding_attention"
            )
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )

    def _check_experts(self) -> None:
        count, chosen, layers = self.num_experts, self.num_experts_per_tok, self.mlp_only_layers
        if count is not None and not 1 <= chosen <= count:
            raise ValueError(f"num_experts_per_tok is {chosen} of num_experts {count}")
        if layers and not set(layers) <= set(range(self.num_hidden_layers)):
            raise ValueError(f"mlp_only_layers {layers}: of {self.num_hidden_layers} layers")
        if self.scoring_func not in SCORES:
            raise ValueError(
                f"scoring_func is {self.scoring_func!r}: choose one of {', '.join(SCORES)}"
            )
        softmax = self.scoring_func == "softmax"
        if (softmax and self.expert_bias) or not (softmax or self.norm_topk_prob):
            raise ValueError(
                "expert_bias goes with scoring_func sigmoid, and norm_topk_prob false with softmax"
            )

    def expert_layers(self) -> tuple[int, ...]:
        """The layers that have experts in place of the MLP, numbered from 0."""
        if self.num_experts is None:
            return ()
        without = self.mlp_only_layers or ()
        return tuple(i for i in range(self.num_hidden_layers) if i not in without)

    def residual_scale(self) -> float | None:
        """What each output is multiplied by before it is added; None: by learned numbers."""
        power = SCALINGS[self.residual_scaling]
        return None if power is None else (2 * self.num_hidden_layers) ** power

    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer, in tokens. None: the layer attends to all tokens."""
        types = getattr(self, "layer_types", ["full_attention"] * self.num_hidden_layers)
        return tuple(self.sliding_window if t == "sliding_attention" else None for t in types)

    def ladder_layer_indices(self) -> tuple[int, ...]:
        """The ladder layers, numbered from 0."""
        return ladder_layer_indices(self.residual, self.ladder_layers, self.num_hidden_layers)
