"""Transformer Engine's grouped experts against megatron-core's local ones in fp32, in standard and ladder
layers, in bf16 and FP8.

Those are held to plain PyTorch by tests/distributed/test_experts.py. Here tokens go to the same experts
whatever the precision: a route that flips by rounding would hide all else. One expert gets no tokens.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.fields.experts import ExpertsConfig
from megatron_ladder.fp8 import Fp8Config, Fp8Recipe
from tests.ranks import run_ranks
from tests.te_run import BATCH, LAYERS, Run, model_of
from tests.te_stand_in import MARKS

pytestmark = MARKS
EXPERTS = ExpertsConfig(
    num_moe_experts=4,
    moe_ffn_hidden_size=256,
    moe_shared_expert_intermediate_size=128,
    moe_router_load_balancing_type="none",
)
BOUNDS = {"tensorwise": (0.02, 0.3), "blockwise": (0.1, 0.25)}
"""The largest relative difference of a parameter's gradient from fp32's, in norm."""
LAYOUTS = {
    "1": ParallelConfig(),
    "tp2-sp-ep2": ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2
    ),
}


def model_with_experts(kind: str) -> ModelConfig:
    return replace(model_of(kind), experts=EXPERTS)


def send_by_chance() -> None:
    """Each layer's tokens go to experts drawn by its number, unevenly, the last one but one to none."""
    from megatron.core.transformer.moe.router import TopKRouter

    def routing(self: Any, logits: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        logits = logits.view(-1, self.num_experts)
        generator = torch.Generator().manual_seed(self.layer_number)
        likely = torch.tensor([4.0, 1.0, 0.0, 2.0]).expand(len(logits), -1)
        chosen = torch.multinomial(likely, self.topk, generator=generator)
        taken = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
        return logits.float().masked_fill(~taken, -torch.inf).softmax(-1), taken

    TopKRouter.routing = routing


def run_kind(kind: str, layout: str, recipes: tuple[Fp8Recipe, ...]) -> list[str]:
    """What is wrong with it, in words."""
    from tests.te_stand_in import grouped_kernels, kernels

    kernels.install()
    send_by_chance()
    from megatron_ladder.mcore_compat import initialize_model_parallel

    parallel = LAYOUTS[layout]
    initialize_model_parallel(parallel, seed=0)
    # Ranks gather blocks of 128 tokens.
    batch = BATCH * (2 if parallel.sequence_parallel else 1)
    run_of = partial(Run, model_with_experts(kind), parallel, batch=batch)
    local = run_of(impl="local")
    found = []

    def check(what: str, holds: bool, *figures: Any) -> None:
        if not holds:
            found.append(f"{what}: {figures}")

    exact = run_of(weights=local.weights, recompute="full")
    check("fp32", exact.worst(local) < 3e-5, exact.worst(local))
    uneven = {tokens for call in grouped_kernels.calls for tokens in call}
    check("uneven", 0 in uneven and any(tokens % 16 for tokens in uneven), uneven)
    bf16 = run_of(weights=local.weights, precision="bf16")
    check("bf16", bf16.worst(local) < 0.05, bf16.worst(local))
    for recipe in recipes:
        runs = {}
        for recompute in ("none", "full"):
            kernels.gemms.clear()
            grouped_kernels.calls.clear()
            run = runs[recompute] = run_of(
                weights=local.weights,
                precision="bf16",
                fp8=Fp8Config(recipe=recipe),
                recompute=recompute,
            )
            name, (least, most) = f"{recipe} {recompute}", BOUNDS[recipe]
            check(name, least < run.worst(local) < most, run.worst(local))
            padded = {tokens % 16 for call in grouped_kernels.calls for tokens in call}
            check(f"{name}: whole rows of 16 bytes", padded == {0}, padded)
            in_bf16 = sum(not fp8 for fp8, _ in kernels.gemms)
            check(f"{name}: all GEMMs in FP8 but the routers'", in_bf16 == 3 * LAYERS, in_bf16)
        check(f"{recipe} recomputed", runs["full"].worst(runs["none"]) == 0)
    return found


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("standard", "1"),
        ("ladder", "1"),
        ("ladder", "tp2-sp-ep2"),
        ("parallel-ladder", "tp2-sp-ep2"),
    ],
)
def test_grouped_experts(kind: str, layout: str, tmp_path: Path) -> None:
    ranks = LAYOUTS[layout].tensor_model_parallel_size
    recipes = ("tensorwise", "blockwise")
    for found in run_ranks(ranks, run_kind, kind, layout, recipes, tmp_path=tmp_path):
        assert not found


def run_under_ddp(recipe: Fp8Recipe | None) -> tuple[float, bool]:
    """The worst difference of gradients from those without DDP, and whether each expert's GEMM wrote its
    own in each micro-batch."""
    from tests.te_stand_in import kernels

    kernels.install()
    send_by_chance()
    from megatron_ladder.mcore_compat import initialize_model_parallel
    from pretrain.optim.optimizer import wrap_data_parallel

    model, parallel = model_with_experts("ladder"), ParallelConfig()
    initialize_model_parallel(parallel, seed=0)
    options: dict[str, Any] = {"precision": "bf16", "fp8": Fp8Config(recipe=recipe)}
    plain = Run(model, parallel, **options)
    run = Run(model, parallel, steps=0, weights=plain.weights, **options)
    (ddp,) = wrap_data_parallel([run.gpt])
    for _ in range(2):  # steps: the second finds nothing of the first
        ddp.zero_grad_buffer()
        run.gpt.set_is_first_microbatch()
        kernels.gemm_weights.clear()
        for _ in range(2):  # micro-batches
            run.forward().backward()
    experts = {
        p.main_grad.data_ptr()
        for n, p in run.own.items()
        if "experts.linear" in n and "weight2" not in n
    }
    difference = max(
        float(
            (p.main_grad / 2 - plain.gradients[n]).norm()
            / plain.gradients[n].norm().clamp(min=1e-9)
        )
        for n, p in run.own.items()
    )
    return difference, experts <= set(kernels.gemm_weights)


@pytest.mark.parametrize("recipe", [None, "tensorwise"])
def test_weight_gradients_of_experts_are_added_to_ddps_buffer(
    recipe: Fp8Recipe | None, tmp_path: Path
) -> None:
    ((difference, written),) = run_ranks(1, run_under_ddp, recipe, tmp_path=tmp_path)
    assert written
    assert difference < 1e-2  # bf16 against fp32, which the buffer is of
