"""The memory plan of experts, against what layers keep for backward and what training holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ladder.config import ModelConfig
from megatron_ladder.fields.experts import ExpertsConfig
from megatron_ladder.mcore_compat import (
    build_gpt_model,
    initialize_model_parallel,
    transformer_config,
)
from pretrain.plan.experts import Rows, kept_bytes
from pretrain.plan.memory import activation_bytes, memory_plan
from tests.distributed.layouts import (
    Layout,
    batches,
    configuration,
    micro_batches,
    start,
    train_step,
)
from tests.kept import kept_by
from tests.ranks import run_ranks

BATCH, LENGTH, LAYERS = 4, 64, 3
EXPERTS = {
    "dropless": ExpertsConfig(num_moe_experts=4, moe_ffn_hidden_size=96),
    "shared": ExpertsConfig(
        num_moe_experts=8,
        moe_router_topk=3,
        moe_ffn_hidden_size=96,
        moe_shared_expert_intermediate_size=64,
    ),
    "padded": ExpertsConfig(
        num_moe_experts=4,
        moe_ffn_hidden_size=96,
        moe_expert_capacity_factor=1.5,
        moe_pad_expert_input_to_capacity=True,
    ),
}


def kept_more(residual: Any, experts: ExpertsConfig, layout: Layout) -> tuple[float, float]:
    """What layers with experts keep more than layers with an MLP: bytes measured, and planned."""
    torch.compiler.set_stance("force_eager")  # of SwiGLU, which is one kernel on a GPU
    parallel = configuration("experts", layout).parallel
    initialize_model_parallel(parallel, seed=0)
    tokens = torch.randint(
        0,
        512,
        (BATCH, LENGTH),
        generator=torch.Generator().manual_seed(dist.get_rank() // layout.tp),
    )
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    received: list[int] = []

    def measured(model: ModelConfig, ep: int) -> int:
        divided = replace(parallel, expert_model_parallel_size=ep)
        mcore = transformer_config(
            model, divided, precision="bf16", impl="local", recompute=layout.recompute
        )
        mcore.bias_activation_fusion = True  # as on a GPU
        (gpt,) = build_gpt_model(model, mcore, "local")
        for layer in gpt.decoder.layers:
            if layer.is_moe_layer:
                layer.mlp.experts.register_forward_pre_hook(
                    lambda _, inputs: received.append(inputs[0].size(0))
                )

        def forward() -> Tensor:
            return gpt(tokens, positions, None, labels=tokens).float().mean()

        return kept_by(forward, list(gpt.parameters()))

    model = ModelConfig(
        num_layers=LAYERS,
        hidden_size=128,
        ffn_hidden_size=320,
        num_attention_heads=8,
        num_query_groups=2,
        vocab_size=512,
        residual=residual,
    )
    with_experts = replace(model, experts=experts)
    difference = measured(with_experts, layout.ep) - measured(model, 1)

    def planned(ffn: int | None) -> float:
        return activation_bytes(
            model,
            tokens=BATCH * LENGTH,
            seq_length=LENGTH,
            tp=layout.tp,
            sp=layout.sp,
            recompute=layout.recompute,
            ffn=ffn,
        )

    routed = BATCH * LENGTH / layout.tp
    sent = routed * experts.moe_router_topk * (experts.moe_expert_capacity_factor or 1.0)
    more = LAYERS * (planned(experts.moe_shared_expert_intermediate_size or 0) - planned(None))
    full = layout.recompute == "full"
    for rows in () if full and residual == "standard" else received[:LAYERS]:
        given = Rows(routed, sent, float(rows))
        more += kept_bytes(with_experts, given, recomputed=full)
    return difference, more


@pytest.mark.parametrize(
    ("residual", "experts", "layout"),
    [
        ("ladder", "dropless", Layout(dp=2, ep=2)),
        ("ladder", "shared", Layout(tp=2, sp=True, ep=2)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("standard", "dropless", Layout(dp=2, ep=2)),
                ("standard", "shared", Layout(dp=2, ep=2)),
                ("standard", "padded", Layout(dp=2, ep=2)),
                ("standard", "shared", Layout(tp=2, sp=True, ep=2)),
                ("ladder", "padded", Layout(tp=2, sp=True, ep=2)),
                ("ladder", "shared", Layout(dp=2)),
                ("ladder", "shared", Layout(tp=2, sp=True, ep=2, recompute="full")),
                ("standard", "shared", Layout(dp=2, ep=2, recompute="full")),
                ("parallel", "shared", Layout(tp=2, sp=True, ep=2)),
                ("parallel-ladder", "shared", Layout(dp=2, ep=2)),
            )
        ),
    ],
    ids=str,
)
def test_what_layers_of_experts_keep_is_what_is_planned(
    residual: str, experts: str, layout: Layout, tmp_path: Path
) -> None:
    arguments = (kept_more, residual, EXPERTS[experts], layout)
    for measured, planned in run_ranks(2, *arguments, tmp_path=tmp_path):
        assert measured == pytest.approx(planned, rel=0.01, abs=2000)


def held(kind: str, layout: Layout) -> dict[str, tuple[float, float]]:
    """After a step in bf16: bytes measured and planned, by name."""
    config = configuration(kind, layout)
    model = replace(config.model, hidden_size=128, ffn_hidden_size=256)
    config = replace(config, model=model, precision="bf16")
    chunks, optimizer, scheduler = start(config)
    train_step(*(chunks, optimizer, scheduler, iter(micro_batches(batches()[0], config)), config))

    def size(tensors: Any) -> float:
        return float(sum(x.nbytes for x in tensors))

    weights = [p for chunk in chunks for p in chunk.parameters()]
    state = [
        x
        for part in optimizer.chained_optimizers
        for values in part.optimizer.state.values()
        for x in values.values()
        if x.dim()
    ]
    masters = [
        p
        for part in optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for p in group["params"]
        if p.dtype == torch.float32
    ]
    plan = memory_plan(config, layout.dp)
    return {
        "weights": (size(weights), plan.weights),
        "gradients": (size(p.main_grad for p in weights), plan.gradients),
        "optimizer": (size(state) + size(masters), plan.optimizer),
    }


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("a shared expert", Layout(dp=2, ep=2)),
        ("ladder, experts", Layout(tp=2, sp=True, ep=2)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("experts", Layout(dp=2)),
                ("one expert, some MLPs", Layout(dp=2, ep=2)),
                ("a shared expert", Layout(tp=2, sp=True, dp=2, ep=2)),
                ("ladder, a shared expert", Layout(dp=4, ep=2)),
            )
        ),
    ],
    ids=str,
)
def test_what_training_with_experts_holds_is_what_is_planned(
    kind: str, layout: Layout, tmp_path: Path
) -> None:
    """The optimizer's state has two parts: over all data-parallel ranks, and over those with the same
    experts."""
    found = run_ranks(layout.ranks, held, kind, layout, tmp_path=tmp_path)
    for name in ("weights", "gradients"):
        for rank in found:
            measured, planned = rank[name]
            assert measured == pytest.approx(planned, rel=0.01), name
    # Buckets are cut where they come to an end, not where a rank would have as much as the next.
    measured, planned = (sum(rank["optimizer"][i] for rank in found) for i in (0, 1))
    assert measured == pytest.approx(planned, rel=0.01)
