"""The ladder layer with a mixture of experts in place of the MLP.

Experts are one more sub-module of the layer's loop, with two all-to-alls in place of tensor parallelism's
sums: dispatch brings tokens to the ranks of their experts, combine brings the outputs back.

    a' = m + attn(norm1(a))    m' = a' + experts(norm2(m))

    qkv_l | wait combine_{l-1}, add, norm2, route, start dispatch_l | core attention_l | wait dispatch_l
    experts_l | start combine_l | shared expert_l | qkv_{l+1} | wait combine_l, ...

Backward runs the same in the opposite order, with the gradients' all-to-alls.
"""

from typing import Any

from torch import Tensor

from megatron_ladder.collectives.all_to_all import AllToAll
from megatron_ladder.collectives.points import collectives_of, take_part
from megatron_ladder.collectives.ranges import named
from megatron_ladder.layers.halves import Submodule
from megatron_ladder.layers.layer import LadderTransformerLayer


class LadderExpertsLayer(LadderTransformerLayer):
    """A layer built by a ModuleSpec whose MLP is megatron-core's MoELayer."""

    has_experts = True

    def _first_linears(self) -> tuple[Any, Any]:
        experts = self.mlp.experts
        of_experts = experts.local_experts[0] if hasattr(experts, "local_experts") else experts
        return self.self_attention.linear_qkv, of_experts.linear_fc1

    def _start_submodule(self, name: Submodule, x: Tensor, behind: Any = None) -> Tensor:
        if name == "mlp":
            return ExpertCollectives(self.mlp).start(self.pre_mlp_layernorm(x))
        return super()._start_submodule(name, x, behind)

    def _compute(self, name: Submodule, x: Tensor, **kwargs: Any) -> Tensor:
        if name == "mlp":
            with named(f"layer {self.layer_number}: experts"):
                return collectives_of(x).compute(x)
        return super()._compute(name, x, **kwargs)


class ExpertCollectives:
    """The all-to-alls of one call of a layer's experts: in `megatron_ladder/collectives/points.py` it takes
    the place of a sub-module's tensor-parallel collectives.

    Args:
        experts: megatron-core's MoELayer. Of its dispatcher everything is used but the two all-to-alls.
    """

    sequence_parallel = False
    number = None

    def __init__(self, experts: Any) -> None:
        self._experts = experts

    def start(self, x: Tensor) -> Tensor:
        """Routes tokens, and starts to send them to their experts.

        Without padding to a capacity, the ranks first tell each other how many tokens they send, and the
        host waits for these numbers.

        Args:
            x: normalised, [s, b, h], or [s/tp, b, h] with sequence parallelism.

        Returns:
            [tokens, h], in flight: those of this rank's experts.
        """
        experts, dispatcher = self._experts, self._experts.token_dispatcher
        self._normalised: Tensor | None = x
        tokens, weights = experts.preprocess(x, *experts.route(x))
        # What the dispatcher's token_dispatch does before its all-to-alls.
        dispatcher.tokens_per_expert = dispatcher._maybe_dtoh_and_synchronize(
            "before_ep_alltoall", dispatcher.tokens_per_expert
        )
        sends, receives = (
            None if rows is None else [int(count) for count in rows]
            for rows in (dispatcher.input_splits, dispatcher.output_splits)
        )
        layer = experts.layer_number
        self._dispatch = AllToAll(f"dispatch {layer}", dispatcher.ep_group, sends, receives)
        self._combine = AllToAll(f"combine {layer}", dispatcher.ep_group, receives, sends)
        tokens, self._weights = self._dispatch.start(tokens, weights)
        return take_part(tokens, self)

    def arrived(self, x: Tensor) -> Tensor:
        """Waits for the tokens that `start` has returned."""
        x, self._weights = self._dispatch.wait(x, self._weights)
        return take_part(x, self)

    def compute(self, x: Tensor) -> Tensor:
        """The outputs of this rank's experts, times the tokens' weights: [tokens, h] -> [tokens, h]."""
        output, _ = self._experts.routed_experts_compute(x, self._weights)
        del self._weights
        return output

    def sent(self, x: Tensor) -> Tensor:
        """Starts to send the outputs back; meanwhile it computes the shared expert.

        Returns:
            [tokens, h], in flight: the outputs of this rank's tokens.
        """
        (x,) = self._combine.start(x)
        self._shared = self._experts.shared_experts_compute(self._normalised)
        self._normalised = None
        return take_part(x, self)

    def complete(self, x: Tensor) -> Tensor:
        """Waits for what `sent` has returned, and adds up each token's outputs: [s, b, h], or [s/tp, b, h]
        with sequence parallelism."""
        (x,) = self._combine.wait(x)
        shared, self._shared = self._shared, None
        return self._experts.postprocess(x, shared)
