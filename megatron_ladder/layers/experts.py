"""Parts of a mixture of experts, after megatron-core's: a router that counts, the experts in plain torch,
and the ranks of their gradients. The layer is in experts_layer.py.
"""

import warnings
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class CountingRouter(TopKRouter):
    """megatron-core's router, which counts in training how many tokens each expert was chosen for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        count = torch.zeros(self.num_experts, device=torch.cuda.current_device())
        # Of this rank's tokens, since pretrain/model/routers.py set them to zero: fp32 [experts].
        self.register_buffer("tokens_chosen", count, persistent=False)
        self.register_buffer("tokens_dropped", count.clone(), persistent=False)
        # The sum over these tokens of the entropy of a token's scores, in nats: fp32, one number.
        self.register_buffer("entropy", count.sum(), persistent=False)

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[s, b, experts] -> the weights and the choice (bool), both [s b, experts]."""
        weights, taken = super().routing(logits, *args, **kwargs)
        # In recomputation the first forward has no gradients, so that each token is counted once.
        if self.training and torch.is_grad_enabled():
            self._count(logits.detach(), taken)
        return weights, taken

    @torch.no_grad()
    def _count(self, logits: Tensor, taken: Tensor) -> None:
        chosen = taken
        if self._drops:
            chosen = self._choice(logits)
            self.tokens_dropped += (chosen & ~taken).sum(dim=0)
        self.tokens_chosen += chosen.sum(dim=0)
        self.entropy += entropies(logits, self.score_function).sum()

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


def entropies(logits: Tensor, score_function: str) -> Tensor:
    """The entropy of each token's scores as shares of all experts, in nats: [..., experts] -> fp32 [...].

    Sigmoids are divided by their sum.
    """
    logs = logits.float() if score_function == "softmax" else logits.float().sigmoid().log()
    logs = logs.log_softmax(dim=-1)
    return -(logs.exp() * logs).sum(dim=-1)


class LocalExperts(SequentialMLP):
    """megatron-core's experts one after another, whose first weights do not depend on the layout.

    Without a GPU all ranks have one random state, from which megatron-core draws the weights. So ranks
    with different experts would draw the same ones, and the layers after them others in each layout.
    """

    def __init__(self, num_local_experts: int, config: Any, *args: Any, **kwargs: Any) -> None:
        before = torch.get_rng_state()
        with warnings.catch_warnings():
            # That one rank has no sequence parallelism: experts are not cut.
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
