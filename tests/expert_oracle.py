"""The unsharded reference of a mixture of experts in plain PyTorch, in fp32: every residual kind with one.

Weights have the names that they have in a checkpoint, those of layers are stacked, so gradients have them
too.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ladder.config import PARALLEL, STALE
from pretrain.config.train import TrainConfig

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
        self.model, self._config = config.model, config
        self.weights = {
            name: w.clone().float().requires_grad_(BIAS not in name) for name, w in weights.items()
        }
        self.chosen: dict[int, Tensor] = {}
        """By layer: how many tokens of the last batch each expert was chosen for."""
        self.dropped = 0.0
        """Of all choices so far."""
        o = config.optimizer
        self._optimizer = torch.optim.AdamW(
            [
                {
                    "params": [
                        w
                        for n, w in self._trained()
                        if ("norm" in n or "scales" in n) == are_vectors
                    ],
                    "weight_decay": 0.0 if are_vectors else o.weight_decay,
                }
                for are_vectors in (True, False)
            ],
            lr=o.lr,
            betas=(o.adam_beta1, o.adam_beta2),
            eps=o.adam_eps,
        )

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, w) for name, w in self.weights.items() if w.requires_grad)

    def step(self, tokens: Tensor, cut: Cut) -> tuple[float, dict[str, Tensor]]:
        """Trains on [batch, length + 1] tokens. Returns the cross-entropy before, and the gradients."""
        self._optimizer.zero_grad()
        loss, balance = self.losses(tokens, cut)
        (loss + balance).backward()
        gradients = {name: w.grad.clone() for name, w in self._trained() if w.grad is not None}
        clip = self._config.optimizer.clip_grad
        torch.nn.utils.clip_grad_norm_([w for _, w in self._trained()], clip)
        self._optimizer.step()
        e = self.model.experts
        for i, counts in self.chosen.items() if e.moe_router_enable_expert_bias else ():
            with torch.no_grad():
                towards = torch.sign(counts.mean() - counts)
                self.of_layer(i, BIAS).add_(e.moe_router_bias_update_rate * towards)
        return loss.item(), gradients

    def of_layer(self, i: int, name: str) -> Tensor:
        apart = self.weights.get(f"decoder.layers.{i}.{name}")
        return self.weights[f"decoder.layers.{name}"][i] if apart is None else apart

    def losses(self, tokens: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy of [batch, length + 1] tokens, and the loss of the balance."""
        logits, balance = self.logits(tokens[:, :-1], cut)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), balance

    def logits(self, tokens: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
        """[batch, length] tokens -> [batch, length, vocabulary], and the loss of the balance."""
        embedding = self.weights["embedding.word_embeddings.weight"]
        x, balance = embedding[tokens], torch.zeros(())
        last = x  # the state without the last output
        for i, residual in enumerate(self.model.layer_residuals()):
            is_stale, is_parallel = residual in STALE, residual in PARALLEL
            n = self._normed(
                last if is_stale else x, i, "self_attention.linear_qkv.layer_norm_weight"
            )
            attended = self._attention(n, i)
            if not is_parallel:
                last, x = x, x + self._scale(i, 0) * attended
                n = self._normed(last if is_stale else x, i, self._mlp_norm(i))
            output, loss = self._feed_forward(n, i, cut)
            balance = balance + loss
            if is_parallel:
                output = attended + output
            last, x = x, x + self._scale(i, 0 if is_parallel else 1) * output
        norm = self.weights["decoder.final_layernorm.weight"]
        return self._norm(x, norm) @ embedding.t(), balance

    def _mlp_norm(self, i: int) -> str:
        has_experts = self.model.experts.layers(self.model.num_layers)[i]
        return "pre_mlp_layernorm.weight" if has_experts else "mlp.linear_fc1.layer_norm_weight"

    def _feed_forward(self, n: Tensor, i: int, cut: Cut) -> tuple[Tensor, Tensor]:
        """The output of a layer's experts, or its MLP, and its part of the loss of the balance."""
        if self.model.experts.layers(self.model.num_layers)[i]:
            return self._experts(n, i, cut)
        return self._mlp(n, i, "mlp"), torch.zeros(())

    def _scale(self, i: int, which: int) -> Tensor | float:
        """What the first or second output of a layer is multiplied by."""
        if self.model.residual_scaling == "skipinit":
            return self.of_layer(i, "residual_scales")[which]
        n = 2 * self.model.num_layers
        return {"none": 1.0, "1/n": 1 / n, "1/sqrt-n": n**-0.5}[self.model.residual_scaling]

    def _normed(self, x: Tensor, i: int, name: str) -> Tensor:
        return self._norm(x, self.of_layer(i, name)) if self.model.layer_norms else x

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.model.layernorm_epsilon)

    def _attention(self, x: Tensor, i: int) -> Tensor:
        heads, width = self.model.num_attention_heads, self.model.head_dim
        assert self.model.kv_heads == heads
        qkv = x @ self.of_layer(i, "self_attention.linear_qkv.weight").t()
        q, k, v = qkv.view(*x.shape[:2], heads, 3, width).permute(3, 0, 2, 1, 4)
        steps = torch.arange(0, width, 2) / width
        angles = torch.outer(torch.arange(x.shape[1]).float(), self.model.rotary_base**-steps)
        cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))

        def turned(y: Tensor) -> Tensor:
            first, second = y.chunk(2, -1)
            return y * cos + torch.cat((-second, first), -1) * sin

        output = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
        return (
            output.transpose(1, 2).flatten(2)
            @ self.of_layer(i, "self_attention.linear_proj.weight").t()
        )

    def _mlp(self, x: Tensor, i: int, name: str, expert: int | None = None) -> Tensor:
        first, second = (self.of_layer(i, f"{name}.linear_fc{n}.weight") for n in (1, 2))
        if expert is not None:
            first, second = first[expert], second[expert]
        gate, up = (x @ first.t()).chunk(2, -1)
        return (F.silu(gate) * up) @ second.t()

    def _experts(self, x: Tensor, i: int, cut: Cut) -> tuple[Tensor, Tensor]:
        """The output [b, s, h] of a layer's experts, and its part of the loss of the balance."""
        e = self.model.experts
        logits = x @ self.of_layer(i, "mlp.router.weight").t()
        weights, chosen = self._choice(logits, i)
        self.chosen[i] = chosen.sum((0, 1)).detach()
        taken = chosen
        if e.moe_expert_capacity_factor is not None:
            taken = chosen * cut.back(self._within(cut.groups(weights)), weights)
        self.dropped += (chosen - taken).sum().item()
        weights = weights * taken
        output = sum(
            weights[..., n : n + 1] * self._mlp(x, i, "mlp.experts.experts", n)
            for n in range(e.num_moe_experts)
        )
        if e.moe_shared_expert_intermediate_size:
            output = output + self._mlp(x, i, "mlp.shared_experts")
        return output, self._balance(logits, cut)

    def _choice(self, logits: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """The weights of each token's experts, and which these are: both [b, s, experts]."""
        e, k = self.model.experts, self.model.experts.moe_router_topk
        if e.moe_router_score_function == "sigmoid":
            scores = logits.sigmoid()
            biased = scores + self.of_layer(i, BIAS) if e.moe_router_enable_expert_bias else scores
            which = biased.topk(k, -1).indices
            top = scores.gather(-1, which)
            top = top / top.sum(-1, keepdim=True)
        elif e.moe_router_pre_softmax:
            top, which = logits.softmax(-1).topk(k, -1)
        else:
            top, which = logits.topk(k, -1)
            top = top.softmax(-1)
        zeros = torch.zeros_like(logits)
        return zeros.scatter(-1, which, top), zeros.scatter(-1, which, 1.0)

    def _within(self, weights: Tensor) -> Tensor:
        """Of [groups, tokens, experts] the tokens with the largest weights, as many as an expert takes."""
        e, tokens = self.model.experts, weights.shape[1]
        mean = tokens * e.moe_router_topk / e.num_moe_experts
        capacity = min(math.ceil(mean * e.moe_expert_capacity_factor), tokens)
        # Called as megatron-core calls it: tokens that are alike tie, and which is kept is up to topk.
        kept = [torch.topk(group, capacity, dim=0, sorted=False)[1] for group in weights.detach()]
        return torch.zeros_like(weights).scatter(1, torch.stack(kept), 1.0)

    def _balance(self, logits: Tensor, cut: Cut) -> Tensor:
        """experts x the sum over experts of (share of choices x mean score), of each group; the mean."""
        e = self.model.experts
        kind = e.moe_router_load_balancing_type
        if kind == "none":
            return torch.zeros(())
        scores = logits.softmax(-1)
        if e.moe_router_score_function == "sigmoid":
            scores = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
        which = scores.topk(e.moe_router_topk, -1).indices
        chosen = torch.zeros_like(scores).scatter(-1, which, 1.0)
        assert kind in ("seq_aux_loss", "aux_loss"), "a running mean has no oracle here"
        size = 1 if kind == "seq_aux_loss" else cut.sequences
        scores, chosen = (Cut(size).groups(y) for y in (scores, chosen))
        shares = chosen.mean(1) / e.moe_router_topk
        return e.moe_aux_loss_coeff * e.num_moe_experts * (shares * scores.mean(1)).sum(-1).mean()
