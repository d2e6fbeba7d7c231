"""Which implementation each part of a training step uses, why, and what it costs."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core import optimizer

from megatron_ladder.layers.attention.choice import CoreAttention
from megatron_ladder.mcore_compat import LadderConfig


@dataclass(frozen=True)
class Choice:
    """One part of a training step, and the implementation chosen for it."""

    part: str
    implementation: str
    why: str
    """Why it is this implementation; empty when it is the fastest one known here."""
    cost: str = ""
    """The extra work, compared with the fastest one. Counted, not measured."""


def choices(config: LadderConfig, adam: type) -> list[Choice]:
    """The implementations that a model built with `config` uses, one for each part of a step.

    Args:
        adam: the optimizer's class: TE's, apex's or torch's, as megatron-core chose it (`adam_class`).
    """
    te = config.transformer_impl == "transformer_engine"
    on_gpu = config.bias_activation_fusion
    lacks = "" if te else _why_local(on_gpu)

    def by_te(part: str, own: str, other: str, cost: str) -> Choice:
        return Choice(part, own, "") if te else Choice(part, other, lacks, cost)

    def compiled(part: str, fused: bool, cost: str) -> Choice:
        if fused:
            return Choice(part, "one kernel, by torch.compile", "")
        why = "deterministic" if on_gpu else "no GPU"
        return Choice(part, "PyTorch, operator by operator", why, cost)

    norms = "fused with the next linear in standard layers, separate in the others"
    if config.fp8:
        norms += "; in ladder layers they also write the linear's input in FP8"
    return [
        by_te("linears", "Transformer Engine", "megatron-core", "has no FP8"),
        _precision(config, lacks),
        _attention(config.core_attention),
        *over_context_ranks(config),
        by_te(
            "norms",
            f"Transformer Engine, {norms}",
            "torch.nn.functional.rms_norm",
            "takes one more pass over the state in standard layers",
        ),
        by_te(
            "RoPE",
            "Transformer Engine, one kernel",
            "PyTorch, operator by operator",
            "takes about four more passes over queries and keys",
        ),
        compiled(
            "SwiGLU", config.bias_activation_fusion, "takes two more passes over the MLP's width"
        ),
        *(
            [
                compiled(
                    "dropout, add", config.bias_dropout_fusion, "takes one more pass over the state"
                )
            ]
            if config.hidden_dropout
            else []  # without dropout it is one addition, and that is one kernel anyway
        ),
        compiled(
            "cross entropy",
            config.cross_entropy_loss_fusion,
            "takes three more passes over the logits",
        ),
        *_experts(config),
        _weight_gradients(config, te, on_gpu),
        _adam(adam, on_gpu),
    ]


def adam_class() -> type:
    """The class that megatron-core chooses for Adam; without a GPU torch's AdamW (cpu_platform.py)."""
    return optimizer.Adam if torch.cuda.is_available() else torch.optim.AdamW


def _why_local(on_gpu: bool) -> str:
    if not on_gpu:
        return "no GPU"
    if find_spec("transformer_engine") is None:
        return "transformer-engine is not installed"
    return "transformer_impl is local"


def _precision(config: Any, lacks: str) -> Choice:
    if config.fp8:
        return Choice("precision of linears", f"FP8 {config.fp8}, recipe {config.fp8_recipe}", "")
    precision = "bf16" if config.bf16 else "fp32"
    return Choice("precision of linears", precision, lacks or "no fp8.recipe is given")


def _attention(taken: CoreAttention) -> Choice:
    cost = "keeps 2 b heads s x s scores a layer for backward, unless recomputed"
    return Choice("attention", str(taken), taken.why, cost if taken.keeps_scores else "")


def _experts(config: Any) -> list[Choice]:
    if config.num_moe_experts is None:
        return []
    if config.moe_grouped_gemm:
        return [Choice("experts", "Transformer Engine, grouped GEMMs", "")]
    cost = "launches the kernels of each expert by themselves"
    return [Choice("experts", "megatron-core, one after another", "no grouped GEMMs", cost)]


def over_context_ranks(config: LadderConfig) -> list[Choice]:
    """How attention gets the keys and values of other context-parallel ranks; [] where there are none."""
    if config.context_parallel_size == 1:
        return []
    part = f"context over {config.context_parallel_size} ranks"
    gathered = "keys and values are gathered"
    cost = "their collectives are not hidden"
    if config.core_attention.whose == "te":
        if config.cp_comm_type == "p2p":
            return [Choice(part, "Transformer Engine: keys and values go around a ring", "")]
        why = "its ring has no sliding windows"
        return [Choice(part, f"Transformer Engine: {gathered}", why, cost)]
    why = "attention is not Transformer Engine's"
    cost += ", and all keys and values of a layer are kept for backward"
    return [Choice(part, gathered, why, cost)]


def _weight_gradients(config: Any, te: bool, on_gpu: bool) -> Choice:
    part = "weight gradients"
    if config.gradient_accumulation_fusion:
        by = "Transformer Engine's and apex's" if te else "apex's"
        return Choice(part, f"added to the fp32 buffer by {by} GEMMs", "")
    cost = "writes and reads each gradient once more in every micro-batch"
    if te:
        return Choice(
            part,
            "added to the fp32 buffer by Transformer Engine's GEMMs, the output layer's separately",
            "NVIDIA's apex is not installed",
            f"for the output layer: {cost}",
        )
    why = "NVIDIA's apex is not installed" if on_gpu else "no GPU"
    return Choice(part, "added to the fp32 buffer separately, after the GEMM", why, cost)


def _adam(adam: type, on_gpu: bool) -> Choice:
    by = adam.__module__.split(".")[0]
    names = {"transformer_engine": "Transformer Engine's FusedAdam", "apex": "apex's FusedAdam"}
    if by in names:
        return Choice("Adam", names[by], "")
    return Choice(
        "Adam",
        "torch's AdamW, its fused kernel",
        "neither transformer-engine nor NVIDIA's apex is installed" if on_gpu else "no GPU",
    )


def table(found: list[Choice]) -> str:
    """One line of text for each part: its implementation; where it is not the fastest, why and the cost."""
    width = max(len(choice.part) for choice in found)
    lines = []
    for choice in found:
        line = f"  {choice.part:{width}}  {choice.implementation}"
        if choice.why:
            line += f" ({choice.why}{': ' + choice.cost if choice.cost else ''})"
        lines.append(line)
    return "\n".join(lines)
