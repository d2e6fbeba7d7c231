"""The layer with a mixture of experts in place of the MLP, of every residual kind but desync and no-comm.

Experts are one more sub-module of the loop, with two all-to-alls in place of tensor parallelism's sums:
dispatch brings tokens to the ranks of their experts, combine brings the outputs back. In a ladder layer

    a' = m + attn(norm1(a))    m' = a' + experts(norm2(m))

    qkv_l | wait combine_{l-1}, add, norm2, route, start dispatch_l | core attention_l | wait dispatch_l
    experts_l | start combine_l | shared expert_l | qkv_{l+1} | wait combine_l, ...

In a parallel-ladder layer attention and experts read one input, which is a layer older:

    n = norm(a)    m' = m + (attn(n) + experts(n))

    wait dispatch_l | attention_l | wait combine_{l-1}, add, norm, route, start dispatch_{l+1}
    experts_l | start combine_l | shared expert_l
    wait dispatch_{l+1} | attention_{l+1} | wait combine_l, ...

Backward runs the same in the opposite order, with the gradients' all-to-alls. Standard and parallel layers
start the same all-to-alls and wait at once. On a GPU a ladder layer routes after it has launched core
attention (`LadderExpertsLayer._hook_attention`).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_ladder.collectives import streams
from megatron_ladder.collectives.all_to_all import AllToAll
from megatron_ladder.collectives.flight import used_here
from megatron_ladder.collectives.points import (
    Scale,
    collectives_of,
    input_wait,
    output_start,
    output_wait,
    scaled,
    take_part,
)
from megatron_ladder.collectives.ranges import named
from megatron_ladder.layers.halves import Submodule
from megatron_ladder.layers.layer import LadderTransformerLayer
from megatron_ladder.layers.recompute import recomputed


class LadderExpertsLayer(LadderTransformerLayer):
    """A layer built by a ModuleSpec whose MLP is megatron-core's MoELayer."""

    def _hook_attention(self) -> None:
        """Makes the chain run in the middle of attention, before core attention.

        In the chain the host waits for numbers of tokens. A GPU would have nothing to do meanwhile: there
        core attention is launched first.
        """
        dropless = not self.config.moe_pad_expert_input_to_capacity
        # `numbers_drawn` allows the sub-module no random numbers before the chain.
        draws = self.recompute and self.config.attention_dropout > 0
        if streams.host_runs_ahead() and dropless and not draws:
            self.self_attention.linear_proj.register_forward_pre_hook(self._run_chain)
        else:
            super()._hook_attention()

    def _start_submodule(self, name: Submodule, x: Tensor, behind: Any = None) -> Tensor:
        if name == "attention":
            return super()._start_submodule(name, x, behind)
        experts = ExpertCollectives(self.mlp, recompute=self.recompute and self.training)
        if name == "mlp":
            return experts.start(self.pre_mlp_layernorm(x))
        n = self.input_layernorm(x)
        return BothCollectives(experts, self._bring(n, behind, readers=1)).start(n)

    def _compute(self, name: Submodule, x: Tensor, **kwargs: Any) -> Tensor:
        if name == "attention":
            return super()._compute(name, x, **kwargs)
        own: Any = collectives_of(x)
        with named(f"layer {self.layer_number}: experts"):
            return own.compute(x)

    def _both(self, x: Tensor, **kwargs: Any) -> Tensor:
        own: Any = collectives_of(x)
        own.attended = self._compute("attention", own.read_by_attention, **kwargs)
        self._run_chain()
        return self._compute("mlp", x)


class ExpertCollectives:
    """The all-to-alls of one call of a layer's experts: in `megatron_ladder/collectives/points.py` it takes
    the place of a sub-module's tensor-parallel collectives.

    Args:
        experts: megatron-core's MoELayer. Of its dispatcher everything is used but the two all-to-alls.
        recompute: the activations of the experts and of the shared one are computed again in backward.
    """

    sequence_parallel = False
    number = None

    def __init__(self, experts: Any, *, recompute: bool) -> None:
        self._experts, self._recompute = experts, recompute
        self.scale: Scale = None

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
        dispatcher = self._experts.token_dispatcher
        x, tokens_per_expert, weights = dispatcher.dispatch_postprocess(x, self._weights)
        del self._weights

        def experts(x: Tensor, weights: Tensor) -> Tensor:
            output, bias = self._experts.experts(x, tokens_per_expert, weights)
            assert bias is None
            return output

        return dispatcher.combine_preprocess(self._run(experts, x, weights))

    def sent(self, x: Tensor, scale: Scale) -> Tensor:
        """Starts to send the outputs back; meanwhile it computes the shared expert.

        Returns:
            [tokens, h], in flight: the outputs of this rank's tokens.
        """
        self.scale = scale
        (x,) = self._combine.start(x)
        n, self._normalised = self._normalised, None
        self._shared: Tensor | None = None
        if self._experts.use_shared_expert:
            assert n is not None
            # On a GPU the second stream may have made it.
            self._shared = self._run(self._experts.shared_experts_compute, used_here(n))
        return take_part(x, self)

    def complete(self, x: Tensor) -> Tensor:
        """Waits for what `sent` has returned, and adds up each token's outputs: [s, b, h], or [s/tp, b, h]
        with sequence parallelism."""
        (x,) = self._combine.wait(x)
        shared, self._shared = self._shared, None
        if shared is not None:
            used_here(shared)
        return scaled(self._experts.postprocess(x, shared), self.scale)

    def gather_input_again(self, *, for_forward: bool = False) -> bool:
        """False: what the experts read is kept. A rank with one expert recomputes from the very tensor that
        has arrived."""
        return False

    def _run(self, module: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return recomputed(module, *inputs) if self._recompute else module(*inputs)


class BothCollectives:
    """The collectives of a parallel layer's attention and experts, which read one input.

    What goes from point to point are the experts' tokens. Attention's input and output are kept here.

    Args:
        experts: those of the experts.
        read_by_attention: attention's input, from `input_start`.
    """

    number = None

    def __init__(self, experts: ExpertCollectives, read_by_attention: Tensor) -> None:
        self._experts, self.read_by_attention = experts, read_by_attention
        self._own = collectives_of(read_by_attention)
        self.sequence_parallel = self._own is not None and self._own.sequence_parallel
        self.attended: Tensor | None = None
        """Attention's output, partial or in flight: [s, b, h], or [s/tp, b, h]."""

    def start(self, n: Tensor) -> Tensor:
        """`ExpertCollectives.start`."""
        return take_part(self._experts.start(n), self)

    def arrived(self, tokens: Tensor) -> Tensor:
        self.read_by_attention = input_wait(used_here(self.read_by_attention))
        return take_part(self._experts.arrived(tokens), self)

    def compute(self, tokens: Tensor) -> Tensor:
        return self._experts.compute(tokens)

    def gather_input_again(self, *, for_forward: bool = False) -> bool:
        return self._experts.gather_input_again(for_forward=for_forward)

    def sent(self, tokens: Tensor, scale: Scale) -> Tensor:
        del self.read_by_attention
        assert self.attended is not None
        self.attended = output_start(self.attended, self._own)
        self._scale = scale
        return take_part(self._experts.sent(tokens, None), self)

    def complete(self, tokens: Tensor) -> Tensor:
        """The sum of both outputs, [s, b, h], or [s/tp, b, h] with sequence parallelism."""
        attended, self.attended = self.attended, None
        assert attended is not None
        output = output_wait(used_here(attended)) + self._experts.complete(tokens)
        return scaled(output, self._scale)
