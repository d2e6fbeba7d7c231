"""Mixtures of experts: parts of megatron-core's, and the ladder layer with one in place of the MLP.

Of megatron-core's there are a router that counts, the experts in plain torch, and the ranks of their
gradients.

In a ladder layer experts are one more sub-module of the loop, with two all-to-alls in place of tensor
parallelism's sums: dispatch brings tokens to the ranks of their experts, combine brings the outputs back.

    a' = m + attn(norm1(a))    m' = a' + experts(norm2(m))

    qkv_l | wait combine_{l-1}, add, norm2, route, start dispatch_l | core attention_l | wait dispatch_l
    experts_l | start combine_l | shared expert_l | qkv_{l+1} | wait combine_l, ...

Backward runs the same in the opposite order, with the gradients' all-to-alls.
"""

import warnings
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_ladder.collectives.all_to_all import AllToAll
from megatron_ladder.collectives.points import collectives_of, take_part
from megatron_ladder.collectives.ranges import named
from megatron_ladder.layers.halves import Submodule
from megatron_ladder.layers.layer import LadderTransformerLayer


class CountingRouter(TopKRouter):
    """megatron-core's router, which counts in training how many tokens each expert was chosen for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        count = torch.zeros(self.num_experts, device=torch.cuda.current_device())
        # Of this rank's tokens, since pretrain/model/routers.py set them to zero: fp32 [experts].
        self.register_buffer("tokens_chosen", count, persistent=False)
        self.register_buffer("tokens_dropped", count.clone(), persistent=False)

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[s, b, experts] -> the weights and the choice (bool), both [s b, experts]."""
        weights, taken = super().routing(logits, *args, **kwargs)
        # In recomputation the first forward has no gradients, so that each token is counted once.
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                chosen = self._choice(logits.detach()) if self._drops else taken
                self.tokens_chosen += chosen.sum(dim=0)
                self.tokens_dropped += (chosen & ~taken).sum(dim=0)
        return weights, taken

    @property
    def _drops(self) -> bool:
        return self.config.moe_expert_capacity_factor is not None

    def _choice(self, logits: Tensor) -> Tensor:
        """The choice before tokens are dropped. megatron-core's function does not hand it out."""
        _, chosen = topk_routing_with_score_function(
            logits.view(-1, self.num_experts),
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
        )
        return chosen


class LocalExperts(SequentialMLP):
    """megatron-core's experts one after another, whose first weights do not depend on the layout.

    Without a GPU all ranks have one random state, from which megatron-core draws the weights. So ranks
    with different experts would draw the same ones, and the layers after them others in each layout.
    """

    def __init__(self, num_local_experts: int, config: Any, *args: Any, **kwargs: Any) -> None:
        before = torch.get_rng_state()
        with (
            warnings.catch_warnings()
        ):  # that one rank has no sequence parallelism: experts are not cut
            warnings.simplefilter("ignore")
            super().__init__(num_local_experts, config, *args, **kwargs)
        if config.use_cpu_initialization:
            torch.set_rng_state(before)
            self._draw(int(torch.randint(1 << 62, (), device="cpu")))

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        """Draws each expert's weights by a seed and the expert's number among all."""
        first = self.ep_group.rank() * self.num_local_experts
        with torch.random.fork_rng(devices=[]):
            for number, expert in enumerate(self.local_experts, first):
                torch.manual_seed(seed + number)
                for weight, init in (
                    (expert.linear_fc1.weight, self.config.init_method),
                    (expert.linear_fc2.weight, self.config.output_layer_init_method),
                ):
                    drawn = torch.empty(weight.shape, dtype=torch.float32)  # as of other weights
                    init(drawn)
                    weight.copy_(drawn)


def sum_gradients_over_their_own_ranks(gpt: Any) -> None:
    """Tells DDP over which ranks it sums the gradients of experts' weights. Call it before DDP is made.

    These are other ranks than those of other weights where the experts are divided, and also with tensor
    parallelism: experts are not cut, and the tensor-parallel ranks send them other tokens. The latter
    megatron-core 0.16 does not know.
    """
    config = gpt.config
    own = config.expert_model_parallel_size > 1 or config.tensor_model_parallel_size > 1
    for layer in gpt.decoder.layers:
        if layer.is_moe_layer:
            for weight in layer.mlp.experts.parameters():
                weight.allreduce = not own


class LadderExpertsLayer(LadderTransformerLayer):
    """A layer built by a ModuleSpec whose MLP is megatron-core's MoELayer."""

    def _start_submodule(self, name: Submodule, x: Tensor, behind: Any = None) -> Tensor:
        if name == "mlp":
            return ExpertCollectives(self.mlp).start(self.pre_mlp_layernorm(x))
        return super()._start_submodule(name, x, behind)

    def _compute(self, name: Submodule, x: Tensor, **kwargs: Any) -> Tensor:
        if name == "mlp":
            own: Any = collectives_of(x)
            with named(f"layer {self.layer_number}: experts"):
                return own.compute(x)
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

    def sent(self, x: Tensor, scale: None) -> Tensor:
        """Starts to send the outputs back; meanwhile it computes the shared expert.

        Returns:
            [tokens, h], in flight: the outputs of this rank's tokens.
        """
        assert scale is None, "outputs of experts are not scaled"
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
