"""A small model built of either kind of layers, for tests that compare them on a GPU or its stand-in."""

import re
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.fields.experts import ExpertsConfig
from megatron_ladder.layers.attention.context import tokens_of
from megatron_ladder.layers.attention.documents import Documents
from megatron_ladder.mcore_compat import build_gpt_model, transformer_config

KINDS: dict[str, dict[str, Any]] = {
    "standard": {"residual": "standard"},
    "parallel": {"residual": "parallel"},
    "ladder": {"residual": "ladder"},
    "last-n": {"residual": "ladder", "ladder_layers": 2},
    "desync": {"residual": "desync", "desync_interval": 2},
    "windows": {
        "residual": "standard",
        "sliding_window": 20,
        "sliding_window_layers": 2,
        "rope_scaling_type": "yarn",
        "rope_scaling_factor": 4.0,
    },
    "ladder windows": {"residual": "ladder", "sliding_window": 20, "sliding_window_layers": 2},
    "qk-norm": {"residual": "ladder", "qk_layernorm": True, "add_qkv_bias": True},
    "parallel-ladder": {"residual": "parallel-ladder"},
    "ladder by 1/sqrt-n": {"residual": "ladder", "residual_scaling": "1/sqrt-n"},
    "standard in halves": {"residual": "standard"},
    "parallel in halves": {"residual": "parallel"},
}
LAYOUTS = {
    "1": ParallelConfig(),
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "tp2-sp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
}
VOCAB, LAYERS, BATCH, LENGTH = 512, 3, 2, 64

EXPERTS = ExpertsConfig(
    num_moe_experts=4,
    moe_ffn_hidden_size=256,
    moe_shared_expert_intermediate_size=128,
    moe_router_load_balancing_type="none",
)

# TE's fused norm + linear, of standard layers, has the norm's weight.
FUSED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def layout_of(kind: str, layout: str) -> ParallelConfig:
    return replace(LAYOUTS[layout], tp_overlap="halves" if in_halves(kind) else "none")


def in_halves(kind: str) -> bool:
    return kind.endswith(" in halves")


def model_of(kind: str) -> ModelConfig:
    return ModelConfig(
        num_layers=LAYERS,
        hidden_size=256,
        ffn_hidden_size=512,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=VOCAB,
        init_method_std=0.05,
        **KINDS[kind],
    )


def model_with_experts(kind: str) -> ModelConfig:
    return replace(model_of(kind), experts=EXPERTS)


def send_by_chance() -> None:
    """Each layer's tokens go to experts drawn by its number, unevenly, and to one none: a route that flips
    by rounding would hide all else. For the whole process."""

    def routing(self: Any, logits: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        logits = logits.view(-1, self.num_experts)
        generator = torch.Generator().manual_seed(self.layer_number)
        likely = torch.tensor([4.0, 1.0, 0.0, 2.0]).expand(len(logits), -1)
        chosen = torch.multinomial(likely, self.topk, generator=generator).to(logits.device)
        taken = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
        return logits.float().masked_fill(~taken, -torch.inf).softmax(-1), taken

    TopKRouter.routing = routing


class Run:
    """One model on one rank, and its gradients after some passes over the same tokens.

    Args:
        weights: of another run; None draws them.
        steps: passes; none leaves the model as it is made.
        batch: sequences of `LENGTH`.
        apart: each sequence is two documents that do not see each other, except the last one, of one.
        options: of `transformer_config`.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        *,
        impl: str = "transformer_engine",
        weights: dict[str, Tensor] | None = None,
        steps: int = 1,
        recompute: str = "none",
        batch: int = BATCH,
        apart: bool = False,
        **options: Any,
    ) -> None:
        self.config = transformer_config(
            *(model, parallel),
            impl=impl,
            recompute=recompute,
            documents_apart=apart,
            micro_batch_size=batch,
            seq_length=LENGTH,
            **options,
        )
        self.batch = batch
        self.documents = None
        if apart:
            numbers = (torch.arange(LENGTH) > LENGTH // 3).repeat(batch, 1)
            numbers[-1] = batch > 1
            self.documents = Documents(numbers)
        torch.manual_seed(0)
        (self.gpt,) = build_gpt_model(model, self.config, impl)
        self.own = {name_of(n): p for n, p in self.gpt.named_parameters()}
        for name, weight in (weights or {}).items():
            self.own[name].data.copy_(weight)
        for _ in range(steps):
            self.gpt.zero_grad()
            self.gpt.set_is_first_microbatch()
            self.forward().backward()
        self.weights = {n: p.detach().clone() for n, p in self.own.items()}
        self.gradients = {n: p.grad.float() for n, p in self.own.items() if p.grad is not None}
        if parallel.context_parallel_size > 1:  # each rank has those of its tokens
            for gradient in self.gradients.values():
                dist.all_reduce(gradient, group=parallel_state.get_context_parallel_group())
                gradient /= parallel.context_parallel_size

    def forward(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, VOCAB, (self.batch, LENGTH + 1), generator=generator).cuda()
        positions = torch.arange(LENGTH).expand(self.batch, -1).cuda()
        here = parallel_state.get_context_parallel_rank(), self.config.context_parallel_size
        mine = [tokens_of(x, *here) for x in (tokens[:, :-1], positions, tokens[:, 1:])]
        losses = self.gpt(
            *(mine[0], mine[1], None),
            labels=mine[2],
            packed_seq_params=self.documents,
        )
        return losses.float().mean()

    def worst(self, other: "Run") -> float:
        """The largest relative difference of a parameter's gradient."""
        return max(
            float((self.gradients[n] - g).norm() / g.norm()) for n, g in other.gradients.items()
        )


def name_of(name: str) -> str:
    """A parameter's name in layers without fused norms, and with grouped experts."""
    for fused, separate in FUSED.items():
        name = name.replace(fused, separate)
    return re.sub(r"local_experts\.(\d+)\.(linear_fc\d)\.weight", r"\2.weight\1", name)
