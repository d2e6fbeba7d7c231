"""Transformer Engine's grouped experts against megatron-core's local ones in fp32, in standard and ladder
layers, in bf16 and FP8.

Those are held to plain PyTorch by tests/distributed/test_experts.py. Here tokens go to the same experts
whatever the precision: a route that flips by rounding would hide all else. One expert gets no tokens.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_ladder.config import ParallelConfig
from megatron_ladder.fp8 import Fp8Config, Fp8Recipe
from tests.ranks import run_ranks
from tests.te_run import BATCH, LAYERS, Run, model_with_experts, send_by_chance
from tests.te_stand_in import MARKS

pytestmark = MARKS
BOUNDS = {"tensorwise": (0.02, 0.3), "blockwise": (0.1, 0.25), "mxfp8": (0.1, 0.25)}
"""The largest relative difference of a parameter's gradient from fp32's, in norm."""
OF_HOPPER: tuple[Fp8Recipe, ...] = ("tensorwise", "blockwise")
LAYOUTS = {
    "1": ParallelConfig(),
    "tp2-sp-ep2": ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2
    ),
}


def run_kind(kind: str, layout: str, recipes: tuple[Fp8Recipe, ...]) -> list[str]:
    """What is wrong with it, in words."""
    from tests.te_stand_in import grouped_kernels, kernels

    kernels.install((10, 0) if "mxfp8" in recipes else (9, 0))
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
    check("uneven", any(tokens % 16 for tokens in uneven), uneven)
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
            multiple = 32 if recipe == "mxfp8" else 16
            padded = {tokens % multiple for call in grouped_kernels.calls for tokens in call}
            check(f"{name}: multiples of {multiple}", padded == {0}, padded)
            # megatron-core computes whole standard layers again, and so the router.
            of_a_router = 4 if (kind, recompute) == ("standard", "full") else 3
            in_bf16 = sum(not fp8 for fp8, _ in kernels.gemms)
            others = in_bf16 - of_a_router * LAYERS
            check(f"{name}: all GEMMs in FP8 but the routers'", others == 0, others)
        check(f"{recipe} recomputed", runs["full"].worst(runs["none"]) == 0)
    return found


@pytest.mark.parametrize(
    ("kind", "layout", "recipes"),
    [
        ("standard", "1", OF_HOPPER),
        ("ladder", "1", OF_HOPPER),
        ("ladder", "tp2-sp-ep2", OF_HOPPER),
        ("parallel-ladder", "tp2-sp-ep2", OF_HOPPER),
        ("ladder", "1", ("mxfp8",)),
    ],
)
def test_grouped_experts(
    kind: str, layout: str, recipes: tuple[Fp8Recipe, ...], tmp_path: Path
) -> None:
    ranks = LAYOUTS[layout].tensor_model_parallel_size
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
