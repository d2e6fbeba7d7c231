"""The unsharded reference of a mixture of experts: the plain-PyTorch model of the export, in fp32, with
what training alone has: a capacity, losses for the balance, a router's bias that moves after each step.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ladder.hf.convert import hf_to_megatron
from megatron_ladder.hf.modelling.mlp_ladder import LadderExperts, LadderRouter
from pretrain.config.train import TrainConfig
from tests.oracle import plain_model_of

BIAS = "mlp.router.expert_bias"


@dataclass(frozen=True)
class Cut:
    """How a layout cuts a batch [batch, length]: capacity and aux_loss depend on it."""

    sequences: int
    """Of a micro-batch."""
    parts: int = 1
    """Of each sequence: tensor-parallel ranks, with sequence parallelism."""

    def groups(self, x: Tensor) -> Tensor:
        """[batch, length, n] -> [groups, tokens, n]; a group is what one rank routes at once, in its
        order: a sequence's tokens apart, those of one position together."""
        return self._blocks(x).permute(0, 2, 3, 1, 4).flatten(0, 1).flatten(1, 2)

    def back(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse of `groups`."""
        batch, length, n = like.shape
        shape = (-1, self.parts, length // self.parts, self.sequences, n)
        return x.view(shape).permute(0, 3, 1, 2, 4).reshape(batch, length, n)

    def _blocks(self, x: Tensor) -> Tensor:
        batch, length, n = x.shape
        shape = (batch // self.sequences, self.sequences, self.parts, length // self.parts, n)
        return x.view(shape)


class Oracle:
    """The model of a configuration and its AdamW.

    Args:
        weights: of a checkpoint, by megatron-core's names.
    """

    def __init__(self, config: TrainConfig, weights: dict[str, Tensor]) -> None:
        self._config, self._experts = config, config.model.experts
        self._plain = plain_model_of(config.model, weights)
        self.chosen: dict[int, Tensor] = {}
        """By layer: how many tokens of the last batch each expert was chosen for."""
        self.entropies: list[Tensor] = []
        """Of every token and layer of all batches so far: of its scores, over that of equal ones."""
        self.dropped = 0.0
        """Of all choices so far."""
        self._routers: dict[int, LadderRouter] = {}
        for i, layer in enumerate(self._plain.model.layers):
            if isinstance(layer.mlp, LadderExperts):
                self._routers[i] = layer.mlp.gate
                layer.mlp.gate.register_forward_hook(functools.partial(self._routed, i))
        o = config.optimizer
        trained = [p for p in self._plain.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for p in trained if (p.dim() == 1) == are_norms],
                    "weight_decay": 0.0 if are_norms else o.weight_decay,
                }
                for are_norms in (True, False)
            ],
            lr=o.lr,
            betas=(o.adam_beta1, o.adam_beta2),
            eps=o.adam_eps,
        )

    def step(self, tokens: Tensor, cut: Cut) -> tuple[float, dict[str, Tensor]]:
        """Trains on [batch, length + 1] tokens. Returns the cross-entropy before, and the gradients."""
        self._optimizer.zero_grad()
        loss, balance = self.losses(tokens, cut)
        (loss + balance).backward()
        gradients = self.gradients()
        torch.nn.utils.clip_grad_norm_(self._plain.parameters(), self._config.optimizer.clip_grad)
        self._optimizer.step()
        if self._experts.moe_router_enable_expert_bias:
            with torch.no_grad():
                for i, counts in self.chosen.items():
                    towards = torch.sign(counts.mean() - counts)
                    towards *= self._experts.moe_router_bias_update_rate
                    self._routers[i].e_score_correction_bias.add_(towards)
        return loss.item(), gradients

    def gradients(self) -> dict[str, Tensor]:
        """Of the last backward, by megatron-core's names. An expert without tokens has zeros."""
        by_name = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in self._plain.named_parameters()
        }
        rows = self._config.model.padded_vocab_size
        found = hf_to_megatron(by_name, self._plain.config, rows)
        return {name: gradient for name, gradient in found.items() if BIAS not in name}

    def losses(self, tokens: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy of [batch, length + 1] tokens, and the loss of the balance."""
        logits, balance = self.logits(tokens[:, :-1], cut)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), balance

    def logits(self, tokens: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
        """[batch, length] tokens -> [batch, length, vocabulary], and the loss of the balance."""
        self._cut, self._shape, self._loss = cut, tokens.shape, torch.zeros(())
        return self._plain(tokens).logits, self._loss

    def _routed(self, i: int, router: LadderRouter, args: Any, weights: Tensor) -> Tensor:
        """Drops choices beyond the capacity of the weights, [tokens, experts], that a router has given."""
        factor = self._experts.moe_expert_capacity_factor
        logits, shaped = (
            x.unflatten(0, self._shape) for x in (args[0] @ router.weight.t(), weights)
        )
        self.entropies.append(self._entropy(logits.detach()))
        chosen = taken = (shaped != 0).float()
        self.chosen[i] = chosen.sum((0, 1))
        if factor is not None:
            kept = self._within(self._cut.groups(shaped), factor)
            taken = chosen * self._cut.back(kept, shaped)
        self.dropped += (chosen - taken).sum().item()
        self._loss = self._loss + self._balance(logits)
        return (shaped * taken).flatten(0, 1)

    def _entropy(self, logits: Tensor) -> Tensor:
        sigmoid = self._experts.moe_router_score_function == "sigmoid"
        scores = logits.double().sigmoid() if sigmoid else logits.double().exp()
        found = torch.distributions.Categorical(probs=scores).entropy()
        return (found / math.log(logits.shape[-1])).flatten()

    def _within(self, weights: Tensor, factor: float) -> Tensor:
        """Of [groups, tokens, experts] the tokens with the largest weights, as many as an expert takes."""
        tokens, experts = weights.shape[1:]
        capacity = min(math.ceil(tokens * self._experts.moe_router_topk / experts * factor), tokens)
        # Called as megatron-core calls it: tokens that are alike tie, and which is kept is up to topk.
        kept = [torch.topk(group, capacity, dim=0, sorted=False)[1] for group in weights.detach()]
        return torch.zeros_like(weights).scatter(1, torch.stack(kept), 1.0)

    def _balance(self, logits: Tensor) -> Tensor:
        """experts x the sum over experts of (share of choices x mean score), of each group; the mean."""
        e = self._experts
        kind = e.moe_router_load_balancing_type
        if kind == "none":
            return torch.zeros(())
        scores = logits.softmax(-1)
        if e.moe_router_score_function == "sigmoid":
            scores = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
        which = scores.topk(e.moe_router_topk, -1).indices
        chosen = torch.zeros_like(scores).scatter(-1, which, 1.0)
        assert kind in ("seq_aux_loss", "aux_loss"), "a running mean has no oracle here"
        size = 1 if kind == "seq_aux_loss" else self._cut.sequences
        scores, chosen = (Cut(size).groups(y) for y in (scores, chosen))
        shares = chosen.mean(1) / e.moe_router_topk
        return e.moe_aux_loss_coeff * logits.shape[-1] * (shares * scores.mean(1)).sum(-1).mean()
