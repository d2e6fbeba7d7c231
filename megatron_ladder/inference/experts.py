"""Experts over the tensor-parallel ranks of an inference engine, where every rank has all tokens.

In training the ranks have different tokens, and all-to-alls bring these to their experts. Here each rank
runs the experts that it has on its own copy of the tokens, and the outputs are summed as those of an MLP
are: one all-reduce, which ladder layers hide as any other.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.layers.halves import Submodule
from megatron_ladder.layers.layer import LadderTransformerLayer


def ranks_of_experts(model: ModelConfig, parallel: ParallelConfig) -> int:
    """The number of tensor-parallel ranks over which an engine divides the experts: as many as can be.

    Where it is less than the tensor-parallel size, several ranks have the same experts, and each takes a
    part of the tokens.
    """
    count = model.experts.num_moe_experts
    return 1 if count is None else math.gcd(count, parallel.tensor_model_parallel_size)


def without_capacity(model: ModelConfig) -> ModelConfig:
    """The model without the limit of its experts' tokens: which tokens they drop depends on what else is
    in the batch, so a request's text would depend on others."""
    experts = replace(
        model.experts, moe_expert_capacity_factor=None, moe_pad_expert_input_to_capacity=False
    )
    return replace(model, experts=experts)


class DividedExperts(MoELayer):
    """megatron-core's experts, for ranks that have the same tokens. Inference only.

    Args:
        sums: forward sums the outputs over the ranks. False: the layer does.
        *args: arguments of MoELayer.
        **kwargs: arguments of MoELayer. The shared expert must leave its output partial.
    """

    def __init__(self, *args: Any, sums: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sums = sums
        # Of the ranks that have the same experts: this one's number, and how many they are.
        self._copy = parallel_state.get_expert_data_parallel_rank()
        self._copies = self.attn_tp_group.size() // self.ep_group.size()

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Normalised [s, b, h] -> [s, b, h], with `sums` whole, else this rank's part of the sum."""
        assert not self.training, "with tensor parallelism, experts train with sequence parallelism"
        weights, chosen = self.route(x)
        mine = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        chosen = chosen[:, mine].clone()
        if self._copies > 1:
            theirs = torch.arange(len(chosen), device=x.device) % self._copies != self._copy
            chosen[theirs] = False
        expert, token = chosen.t().nonzero(as_tuple=True)  # in the order of the experts
        tokens = x.flatten(0, 1)
        outputs, _ = self.experts(tokens[token], chosen.sum(0), weights[:, mine][token, expert])
        output = torch.zeros_like(tokens).index_add_(0, token, outputs.to(x.dtype)).view_as(x)
        if self.use_shared_expert:
            output = output + self.shared_experts(x)
        if self._sums:
            torch.distributed.all_reduce(output, group=self.attn_tp_group)
        return output, None


class DividedExpertsLayer(LadderTransformerLayer):
    """A layer built by a ModuleSpec whose MLP is `DividedExperts`: its collectives are those of an MLP."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # As far as this layer's forward knows.
        self.is_moe_layer = self.chain_dispatches = False

    def _start_submodule(self, name: Submodule, x: Tensor, behind: Any = None) -> Tensor:
        if name != "mlp":
            return super()._start_submodule(name, x, behind)
        return self._bring(self.pre_mlp_layernorm(x), behind, readers=1)
