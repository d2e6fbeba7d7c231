"""Layers built of Transformer Engine's modules against megatron-core's local ones in fp32.

Those are held to the plain-PyTorch oracle by tests/distributed.
"""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_ladder.config import PARALLEL, ParallelConfig
from megatron_ladder.fp8 import Fp8Config, Fp8Recipe
from tests.ranks import run_ranks
from tests.te_run import BATCH, KINDS, LAYERS, LAYOUTS, Run, in_halves, layout_of, model_of
from tests.te_stand_in import MARKS

pytestmark = MARKS


# The largest relative difference of a parameter's gradient from fp32's, in norm. With scales of blocks 0.14
# to 0.21 was found.
BOUNDS = {
    "tensorwise": (0.02, 0.3),
    "delayed": (0.02, 0.3),
    "blockwise": (0.1, 0.25),
    "mxfp8": (0.1, 0.25),
}


def run_kind(kind: str, layout: str, recipes: tuple[Fp8Recipe, ...]) -> list[str]:
    """What is wrong with it, in words."""
    from tests.te_stand_in import kernels

    kernels.install((10, 0) if "mxfp8" in recipes else (9, 0))
    # What TE does where blocks are not whole, which megatron_ladder/fp8.py refuses.
    warnings.filterwarnings("error", message="Cannot quantize input tensor")
    from megatron_ladder.mcore_compat import initialize_model_parallel

    model, parallel = model_of(kind), layout_of(kind, layout)
    initialize_model_parallel(parallel, seed=0)
    calls = 2 if in_halves(kind) else 1  # of each linear, in a pass
    gathers_blocks = model.residual not in PARALLEL and parallel.sequence_parallel
    run_of = partial(Run, model, parallel, batch=calls * BATCH * (2 if gathers_blocks else 1))
    local = run_of(impl="local")
    found = []

    def check(what: str, holds: bool, *figures: Any) -> None:
        if not holds:
            found.append(f"{what}: {figures}")

    for recompute in ("none", "full"):
        run = run_of(weights=local.weights, recompute=recompute)
        # Sums in another order: up to 1.3e-5 at this size. bf16 is a thousand times as far.
        check(f"fp32 {recompute}", run.worst(local) < 3e-5, run.worst(local))
    bf16 = run_of(weights=local.weights, precision="bf16")
    check("bf16", bf16.worst(local) < 0.05, bf16.worst(local))

    for recipe in recipes:
        steps = 2 + 4 * LAYERS if recipe == "delayed" else 1  # each finds one more scale
        runs = {}
        for recompute in ("none", "full"):
            kernels.gemms.clear()
            run = runs[recompute] = run_of(
                weights=local.weights,
                precision="bf16",
                fp8=Fp8Config(recipe=recipe),
                recompute=recompute,
                steps=steps,
            )
            name, (least, most) = f"{recipe} {recompute}", BOUNDS[recipe]
            check(name, least < run.worst(local) < most, run.worst(local))
            check(f"{name}: all GEMMs in FP8", all(fp8 for fp8, _ in kernels.gemms))
            expected = steps * calls * LAYERS * 4 * (3 if recompute == "none" else 4)
            check(f"{name}: GEMMs", len(kernels.gemms) == expected, len(kernels.gemms))
        # Recomputed with the same scales: the same to the last bit.
        check(f"{recipe} recomputed", runs["full"].worst(runs["none"]) == 0)
        if recipe == "delayed":
            continue
        kernels.gemms.clear()
        first_and_last = Fp8Config(
            recipe=recipe, num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1
        )
        run_of(weights=local.weights, precision="bf16", fp8=first_and_last)
        in_fp8 = sum(fp8 for fp8, _ in kernels.gemms)
        check(f"{recipe}: layers in bf16", in_fp8 == calls * (LAYERS - 2) * 4 * 3, in_fp8)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind: str, layout: str, tmp_path: Path) -> None:
    parallel = LAYOUTS[layout]
    if kind == "desync" and parallel.sequence_parallel:
        pytest.skip("desync has no sequence parallelism")
    if in_halves(kind) and layout == "1":
        pytest.skip("halves hide collectives of several ranks")
    ranks, recipes = parallel.tensor_model_parallel_size, ("tensorwise", "delayed", "blockwise")
    for found in run_ranks(ranks, run_kind, kind, layout, recipes, tmp_path=tmp_path):
        assert not found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mxfp8(layout: str, tmp_path: Path) -> None:
    """Apart: it asks for another GPU. TE's Python does with it what it does with blockwise."""
    ranks = LAYOUTS[layout].tensor_model_parallel_size
    for found in run_ranks(ranks, run_kind, "ladder", layout, ("mxfp8",), tmp_path=tmp_path):
        assert not found


def run_under_ddp(kind: str, layout: str, fp8: Fp8Config) -> tuple[float, bool]:
    """The worst difference of gradients from those without DDP, and whether all GEMMs wrote them."""
    from tests.te_stand_in import kernels

    kernels.install()
    from megatron_ladder.mcore_compat import initialize_model_parallel
    from pretrain.optim.optimizer import wrap_data_parallel

    model, parallel = model_of(kind), layout_of(kind, layout)
    initialize_model_parallel(parallel, seed=0)
    options = {"precision": "bf16", "fp8": fp8}
    plain = Run(model, parallel, **options)
    run = Run(model, parallel, steps=0, weights=plain.weights, **options)
    (ddp,) = wrap_data_parallel([run.gpt])
    norms = {
        name: module
        for name, module in run.gpt.named_modules()
        if name.endswith("layernorm") and list(module.parameters())
    }
    called: set[str] = set()
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    for _ in range(2):  # steps: the second finds nothing of the first
        ddp.zero_grad_buffer()
        run.gpt.set_is_first_microbatch()
        kernels.gemm_weights.clear()
        for _ in range(2):  # micro-batches
            run.forward().backward()
    linears = [n for n in plain.gradients if ".linear_" in n]
    buffers = {p.main_grad.data_ptr() for n, p in run.own.items() if n in linears}
    all_written = set(kernels.gemm_weights) == buffers and len(buffers) == 4 * LAYERS
    difference = max(
        float((p.main_grad / 2 - plain.gradients[n]).norm() / plain.gradients[n].norm())
        for n, p in run.own.items()
    )
    assert ddp.module is run.gpt
    # By such a hook DDP waits for a norm's gathered weight.
    assert called == set(norms) and len(norms) == 2 * LAYERS + 1
    return difference, all_written


@pytest.mark.parametrize("recipe", [None, "tensorwise"])
@pytest.mark.parametrize(
    ("kind", "layout"),
    [("ladder", "1"), ("ladder", "tp2-sp"), ("standard in halves", "tp2")],
)
def test_weight_gradients_are_added_to_ddps_buffer_by_the_gemms(
    kind: str, layout: str, recipe: Fp8Recipe | None, tmp_path: Path
) -> None:
    ranks, fp8 = LAYOUTS[layout].tensor_model_parallel_size, Fp8Config(recipe=recipe)
    for difference, all_written in run_ranks(
        ranks, run_under_ddp, kind, layout, fp8, tmp_path=tmp_path
    ):
        assert all_written
        assert difference < 1e-2  # bf16 against fp32, which the buffer is of


def count_scale_updates(recompute: str) -> list[int]:
    """How often gradients' scales are found anew in a step: the linears still to run backward then."""
    from tests.te_stand_in import kernels

    kernels.install()
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager as manager

    from megatron_ladder.mcore_compat import initialize_model_parallel

    updates: list[int] = []
    update = manager.reduce_and_update_fp8_tensors

    def counted(forward: bool = True) -> None:
        if not forward:
            updates.append(len(kernels.gemm_weights))
        update(forward=forward)

    manager.reduce_and_update_fp8_tensors = counted
    model, parallel = model_of("ladder"), ParallelConfig()
    initialize_model_parallel(parallel, seed=0)
    kernels.gemm_weights.clear()
    fp8 = Fp8Config(recipe="delayed")
    Run(model, parallel, precision="bf16", fp8=fp8, recompute=recompute)
    return [4 * LAYERS - done for done in updates]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_delayed_scaling_finds_scales_after_the_last_backward(
    recompute: str, tmp_path: Path
) -> None:
    (left,) = run_ranks(1, count_scale_updates, recompute, tmp_path=tmp_path)
    assert left == [0]
