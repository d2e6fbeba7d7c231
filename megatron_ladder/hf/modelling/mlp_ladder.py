# SPDX-License-Identifier: Apache-2.0
"""What follows attention in a layer: an MLP, or a mixture of experts.

This file is copied into the folders of exported models, beside modeling_ladder.py. The parameters of an MLP
have Llama's names, those of a mixture Qwen3-MoE's and, of shared experts and the router's bias,
DeepSeek-V3's.

The router computes in fp32, whatever the model's dtype is. Of its scores of a token (the logits):

    softmax, norm_topk_prob    the largest are chosen; the weights are the softmax over these
    softmax                    the largest are chosen; the weights are theirs of the softmax over all
    sigmoid, norm_topk_prob    the largest of sigmoid(scores) + bias are chosen; the weights are their
                               sigmoids over the sum of these. One expert a token: its sigmoid

No token is dropped: each goes to all the experts that it chose, whatever a capacity was in training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_ladder import LadderConfig


class LadderMLP(nn.Module):
    """SwiGLU: [..., hidden] -> the same shape."""

    def __init__(self, config: LadderConfig, intermediate_size: int | None = None) -> None:
        super().__init__()
        size = intermediate_size or config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LadderRouter(nn.Module):
    """Chooses the experts of each token."""

    def __init__(self, config: LadderConfig) -> None:
        super().__init__()
        assert config.num_experts is not None
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)
        # No gradient reaches the bias: training moves it by how often each expert is chosen.
        if config.expert_bias:
            bias = torch.zeros(config.num_experts, dtype=torch.float32)
            self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> the weights of each token's experts, fp32 [tokens, experts]; 0 for others."""
        return self.choose(F.linear(x.float(), self.weight.float()))

    def choose(self, scores: Tensor) -> Tensor:
        """Scores, fp32 [tokens, experts] -> weights."""
        k = self.config.num_experts_per_tok
        if self.config.scoring_func == "sigmoid":
            scores = scores.sigmoid()
            biased = scores
            if self.config.expert_bias:
                biased = scores + self.e_score_correction_bias.float()
            chosen = biased.topk(k, -1).indices
            weights = scores.gather(-1, chosen)
            if k > 1:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        elif self.config.norm_topk_prob:
            weights, chosen = scores.topk(k, -1)
            weights = weights.softmax(-1)
        else:
            weights, chosen = scores.softmax(-1).topk(k, -1)
        return torch.zeros_like(scores).scatter(-1, chosen, weights)


class LadderExperts(nn.Module):
    """A mixture of experts: [batch, length, hidden] -> the same shape."""

    def __init__(self, config: LadderConfig) -> None:
        super().__init__()
        self.gate = LadderRouter(config)
        self.experts = nn.ModuleList(
            LadderMLP(config, config.moe_intermediate_size) for _ in range(config.num_experts or 0)
        )
        self.shared_experts: nn.Module | None = None
        if config.shared_expert_intermediate_size:
            self.shared_experts = LadderMLP(config, config.shared_expert_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights = self.gate(tokens).t()  # [experts, tokens]
        chosen = weights != 0
        output = torch.zeros_like(tokens)
        # Each expert's tokens. The host waits for their numbers once, not for each expert.
        rows = chosen.nonzero()[:, 1].split(chosen.sum(1).tolist())
        for expert, weight, mine in zip(self.experts, weights, rows, strict=True):
            if len(mine):
                weighted = expert(tokens[mine]) * weight[mine, None]
                output = output.index_add(0, mine, weighted.to(output.dtype))
        output = output.view_as(x)
        return output if self.shared_experts is None else output + self.shared_experts(x)
