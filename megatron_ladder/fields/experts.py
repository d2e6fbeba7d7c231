"""The fields of a mixture of experts, with the names of megatron-core."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from megatron_ladder.errors import UserError

ScoreFunction = Literal["softmax", "sigmoid"]
LoadBalancing = Literal["seq_aux_loss", "aux_loss", "global_aux_loss", "none"]


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of the MLP (docs/guides/experts.md)."""

    num_moe_experts: int | None = None
    """Routed experts of a layer; None: each layer has one MLP."""
    moe_router_topk: int = 2
    """Experts that each token is sent to."""
    moe_ffn_hidden_size: int | None = None
    """Width of a routed expert; None: model.ffn_hidden_size."""
    moe_shared_expert_intermediate_size: int | None = None
    """Width of the shared expert, through which each token goes as well; None: there is none."""
    moe_layer_freq: int | tuple[int, ...] = 1
    """Layers that have experts: N for each N-th, from the first on; or for each layer 1 (experts) or 0
    (an MLP)."""
    moe_router_score_function: ScoreFunction = "softmax"
    """How scores become the weights of a token's experts. sigmoid: divided by their sum."""
    moe_router_pre_softmax: bool = False
    """softmax over all experts, before the choice, as in DeepSeek-V2. False: over the chosen ones, as in
    Mixtral and Qwen3."""
    moe_router_load_balancing_type: LoadBalancing = "seq_aux_loss"
    """The loss that asks for even use of the experts: within each sequence, within each micro-batch of a
    rank (aux_loss), within the step so far (global_aux_loss), or none. The two in the middle depend on the
    layout."""
    moe_aux_loss_coeff: float = 0.01
    """What that loss is multiplied by."""
    moe_router_enable_expert_bias: bool = False
    """Balances by a bias of each expert's score, which moves against its use (arXiv 2408.15664). With
    sigmoid."""
    moe_router_bias_update_rate: float = 1e-3
    """How far the bias moves in a step."""
    moe_expert_capacity_factor: float | None = None
    """An expert takes at most so many times the mean number of tokens, of those of one rank and
    micro-batch; the rest is dropped. None: no token is dropped."""
    moe_pad_expert_input_to_capacity: bool = False
    """With a capacity: each expert gets as many tokens, padded, so shapes do not change."""

    def __post_init__(self) -> None:
        if self.num_moe_experts is None:
            self._check_unset()
            return
        sizes = ("moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
        for name in sizes:
            if (size := getattr(self, name)) is not None and size < 1:
                raise UserError(f"model.experts.{name} is {size}: it must be at least 1")
        if self.num_moe_experts < 2 or self.moe_router_topk > self.num_moe_experts:
            raise UserError(
                f"model.experts.num_moe_experts is {self.num_moe_experts} and moe_router_topk "
                f"{self.moe_router_topk}: give at least 2 experts, and no more of them to a token than "
                "there are"
            )
        for name, choices in (
            ("moe_router_score_function", ScoreFunction),
            ("moe_router_load_balancing_type", LoadBalancing),
        ):
            if getattr(self, name) not in get_args(choices):
                raise UserError(
                    f"model.experts.{name} is {getattr(self, name)!r}: choose one of "
                    f"{', '.join(get_args(choices))}"
                )
        self._check_router()
        self._check_capacity()

    def _check_unset(self) -> None:
        """Refuses fields of experts in a model without experts."""
        plain = vars(type(self))
        given = [name for name in self.__dataclass_fields__ if getattr(self, name) != plain[name]]
        if given:
            raise UserError(
                f"model.experts.{given[0]} is set, but model.experts.num_moe_experts is not: set it, or "
                "leave the other out"
            )

    def _check_router(self) -> None:
        softmax = self.moe_router_score_function == "softmax"
        if softmax and self.moe_router_topk == 1 and not self.moe_router_pre_softmax:
            raise UserError(
                "model.experts.moe_router_topk is 1: the softmax over one expert is 1, so the router would "
                "learn nothing. Give --model.experts.moe-router-pre-softmax, or more experts a token"
            )
        if not softmax and self.moe_router_pre_softmax:
            raise UserError(
                "model.experts.moe_router_pre_softmax goes with moe_router_score_function softmax: it is "
                f"{self.moe_router_score_function}"
            )
        if softmax and self.moe_router_enable_expert_bias:
            raise UserError(
                "model.experts.moe_router_enable_expert_bias goes with moe_router_score_function sigmoid: "
                "it is softmax"
            )
        for name in ("moe_aux_loss_coeff", "moe_router_bias_update_rate"):
            if not 0 <= (value := getattr(self, name)) < 1e9:
                raise UserError(
                    f"model.experts.{name} is {value}: it must be a number of 0 or more"
                )

    def _check_capacity(self) -> None:
        factor = self.moe_expert_capacity_factor
        if factor is None and self.moe_pad_expert_input_to_capacity:
            raise UserError(
                "model.experts.moe_pad_expert_input_to_capacity needs a moe_expert_capacity_factor, such "
                "as 1.25"
            )
        if factor is not None and not 0 < factor < 1e9:
            raise UserError(
                f"model.experts.moe_expert_capacity_factor is {factor}: give a number above 0, such as "
                "1.25, or leave it out"
            )
        if factor is not None and self.moe_router_load_balancing_type == "global_aux_loss":
            raise UserError(
                "model.experts.moe_expert_capacity_factor does not go with "
                "moe_router_load_balancing_type global_aux_loss in megatron-core: give seq_aux_loss"
            )

    def layers(self, num_layers: int) -> tuple[bool, ...]:
        """Whether each layer has experts, first to last.

        Raises:
            UserError: `moe_layer_freq` does not fit the number of layers.
        """
        freq = self.moe_layer_freq
        if self.num_moe_experts is None:
            return (False,) * num_layers
        if isinstance(freq, int):
            found = tuple(freq > 0 and i % freq == 0 for i in range(num_layers))
        else:
            found = tuple(map(bool, freq))
        if len(found) != num_layers or not any(found) or not set(_listed(freq)) <= {0, 1}:
            raise UserError(
                f"model.experts.moe_layer_freq is {freq}: give a number of 1 or more, or for each of the "
                f"{num_layers} layers 1 (experts) or 0 (an MLP), at least one of them 1"
            )
        return found

    def expert_size(self, ffn_hidden_size: int) -> int:
        """The width of a routed expert, in a model whose MLPs have this width."""
        return self.moe_ffn_hidden_size or ffn_hidden_size

    def layer_weights(self, hidden_size: int, ffn_hidden_size: int, *, active: bool) -> int:
        """The number of weights of one layer's router and experts.

        Args:
            active: only those that one token is multiplied by.
        """
        count = self.num_moe_experts or 0
        width = (self.moe_router_topk if active else count) * self.expert_size(ffn_hidden_size)
        width += self.moe_shared_expert_intermediate_size or 0
        return hidden_size * (3 * width + count)


def _listed(freq: int | tuple[int, ...]) -> tuple[int, ...]:
    return () if isinstance(freq, int) else freq


def check_experts(model: Any, parallel: Any, *, inference: bool = False) -> None:
    """Checks that a layout can divide a model's experts. Raises UserError when it cannot.

    Args:
        model: a `ModelConfig`.
        parallel: a `ParallelConfig`.
        inference: of an inference engine, which sends no tokens to other ranks.
    """
    experts, ep = model.experts, parallel.expert_model_parallel_size
    if experts.num_moe_experts is None:
        if ep > 1:
            raise UserError(
                f"parallel.expert_model_parallel_size is {ep}, but the model has no experts "
                "(model.experts.num_moe_experts): leave it out"
            )
        return
    if model.residual in ("desync", "no-comm"):
        raise UserError(
            f"model.residual {model.residual} does not go with experts: its ranks do not share their "
            "states. Give another kind, or leave model.experts.num_moe_experts out"
        )
    if parallel.tp_overlap == "halves":
        raise UserError("parallel.tp_overlap halves does not go with experts yet: leave it out")
    if experts.num_moe_experts % ep:
        raise UserError(
            f"model.experts.num_moe_experts {experts.num_moe_experts} is not divisible by "
            f"parallel.expert_model_parallel_size {ep}: choose a size that divides it"
        )
    tp = parallel.tensor_model_parallel_size
    if (shared := experts.moe_shared_expert_intermediate_size or 0) % tp:
        raise UserError(
            f"model.experts.moe_shared_expert_intermediate_size {shared} is not divisible by "
            f"parallel.tensor_model_parallel_size {tp}: choose a size that divides it"
        )
    if tp > 1 and not parallel.sequence_parallel and not inference:
        raise UserError(
            "experts over several tensor-parallel ranks need sequence parallelism, so that no two ranks "
            "send the same tokens: give --parallel.sequence-parallel"
        )


def megatron_fields(model: Any, parallel: Any, *, grouped: bool) -> dict[str, Any]:
    """The fields of megatron-core's configuration for a model's experts; {} when it has none.

    Args:
        model: a `ModelConfig`.
        parallel: a `ParallelConfig`.
        grouped: the GEMMs of a rank's experts are one call.
    """
    experts = model.experts
    if experts.num_moe_experts is None:
        return {}
    layers = experts.layers(model.num_layers)
    balances = experts.moe_router_load_balancing_type != "none"
    return {
        **asdict(experts),
        "moe_ffn_hidden_size": experts.expert_size(model.ffn_hidden_size),
        # With a list checkpoints name the tensors of each layer apart. Else they are stacked.
        "moe_layer_freq": 1 if all(layers) else [int(layer) for layer in layers],
        "moe_aux_loss_coeff": experts.moe_aux_loss_coeff if balances else 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": grouped,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": 1,
    }
