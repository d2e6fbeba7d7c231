"""The stand-in kernels refuse what Transformer Engine's refuse; and how layers call them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ladder.config import ParallelConfig
from megatron_ladder.fp8 import Fp8Config, Fp8Recipe
from tests.ranks import run_ranks
from tests.te_run import BATCH, LENGTH, Run, model_of
from tests.te_stand_in import MARKS

pytestmark = MARKS
RECIPES: tuple[Fp8Recipe, ...] = ("tensorwise", "delayed", "blockwise")


def refused() -> list[str]:
    """The calls that were not."""
    from tests.te_stand_in import kernels

    kernels.install()
    import transformer_engine_torch as tex
    from transformer_engine.pytorch import (
        Float8BlockQuantizer,
        Float8CurrentScalingQuantizer,
        Float8Quantizer,
    )
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    from megatron_ladder.te.gemm import add_product

    e4m3, e5m2 = tex.DType.kFloat8E4M3, tex.DType.kFloat8E5M2
    x, bf16, bf16_norm = torch.randn(32, 48).bfloat16(), torch.bfloat16, torch.ones(48).bfloat16()
    missing = "missing column-wise usage"
    only_columns = "Columnwise-only per-tensor FP8 quantization is not implemented"
    accepted: list[str] = []

    def delayed(dtype: Any = e4m3, **usage: bool) -> Any:
        return Float8Quantizer(torch.ones(1), torch.zeros(1), dtype, **usage)

    def current(dtype: Any = e4m3, **usage: bool) -> Any:
        return Float8CurrentScalingQuantizer(dtype, torch.device("cpu"), **usage)

    def blocks() -> Any:
        return Float8BlockQuantizer(
            e4m3, rowwise=True, columnwise=True, force_pow_2_scales=True, block_scaling_dim=1
        )

    def refuses(name: str, call: Callable[[], Any], text: str, kind: type = RuntimeError) -> None:
        try:
            call()
            accepted.append(name)
        except kind as error:
            if text not in str(error):
                accepted.append(f"{name}, because of {error}")

    def norm(quantizer: Any, x: Tensor = x) -> Any:
        return tex.rmsnorm_fwd(x, bf16_norm, 1e-5, None, quantizer, bf16, 0, False)

    def gemm(a: Any, b: Any, layout: str = "TN", dtype: Any = bf16, **kwargs: Any) -> Any:
        return general_gemm(a, b, dtype, layout=layout, **kwargs)

    columns: dict[str, Any] = {"rowwise": False, "columnwise": True}
    for name, of in (("delayed", delayed), ("current", current)):
        whole, rows, stale, room = of()(x), of(columnwise=False)(x), of()(x), of()(x)
        stale._reset_caches()
        calls: dict[str, Callable[[Any], Any]] = {
            "columns": lambda q: q(x),
            "bias": lambda q: tex.bgrad_quantize(x, q),
            "into room": lambda q, room=room: tex.quantize(x, q, room),
        }
        for what, call in calls.items():
            q = of(**columns)
            refuses(f"{name} {what}", lambda q=q, c=call: c(q), only_columns, NotImplementedError)
        for what, a, b, layout in (
            ("dgrad", rows, of()(x.t()), "NN"),
            ("wgrad", whole, rows, "NT"),
            ("stale", stale, whole, "NT"),
        ):
            refuses(f"{name} {what}", lambda a=a, b=b, on=layout: gemm(a, b, on), missing)
    refuses("norm", lambda: norm(current(**columns)), only_columns, NotImplementedError)
    refuses("delayed norm", lambda: norm(delayed(**columns)), "same shape as x")
    refuses("norm's e5m2", lambda: norm(delayed(e5m2)), "e5m2")
    refuses("norm in 3D", lambda: norm(None, x[None]), "2D")
    refuses("FP8 twice", lambda: tex.quantize(current()(x), current()), "higher precision")
    refuses("two e5m2", lambda: gemm(current(e5m2)(x), current(e5m2)(x)), "e5m2")
    refuses("half in FP8", lambda: gemm(current()(x), x), "algorithm")
    refuses("two kinds of scales", lambda: gemm(current()(x), blocks()(x)), "scaling modes")
    short = x[:, :24].contiguous()
    refuses("inner of 24", lambda: gemm(current()(short), current()(short)), "Leading dimension")
    few = current()(x[:12].contiguous())
    refuses("12 outputs", lambda: gemm(few, current()(x)), "outputs")
    refuses("strides", lambda: gemm(x.t(), x[:, :32].contiguous()), "strides")
    wide = torch.zeros(32, 32)
    refuses("output's dtype", lambda: gemm(x, x, out=wide), "dtype")
    refuses("output's size", lambda: gemm(x, x, dtype=torch.float32, out=wide[:16]), "dims")
    refuses("bf16 of fp32", lambda: gemm(x.float(), x.float()), "dtypes")
    # And what they do not.
    left, total = torch.randn(1, 16).bfloat16().expand(32, 16), torch.zeros(16, 48)
    add_product(left, x, total)
    torch.testing.assert_close(total, left.float().t() @ x.float())
    assert gemm(x, x, dtype=torch.float32, out=wide)[0].data_ptr() == wide.data_ptr()
    for of in (delayed, current, blocks):
        assert gemm(of()(x), of()(x))[0].shape == (32, 32)
        assert norm(of())[0]._fp8_dtype == e4m3
    return accepted


def test_what_transformer_engine_refuses(tmp_path: Path) -> None:
    (accepted,) = run_ranks(1, refused, tmp_path=tmp_path)
    assert not accepted


def accumulators(recipe: Fp8Recipe) -> list[dict]:
    """How the GEMMs of TE's own layers accumulate, and those of ladder layers."""
    from tests.te_stand_in import kernels

    kernels.install()
    from megatron_ladder.mcore_compat import initialize_model_parallel

    initialize_model_parallel(ParallelConfig(), seed=0)
    found = []
    for kind in ("standard", "ladder"):
        kernels.precise.clear()
        Run(model_of(kind), ParallelConfig(), precision="bf16", fp8=Fp8Config(recipe))
        found.append(dict(kernels.precise))
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_sums_are_as_precise_as_in_transformer_engines_layers(
    recipe: Fp8Recipe, tmp_path: Path
) -> None:
    ((theirs, ours),) = run_ranks(1, accumulators, recipe, tmp_path=tmp_path)
    assert len(theirs) == 3  # output, input's gradient, weight's gradient
    assert ours == theirs


def kept_rows(recipe: Fp8Recipe, recompute: str) -> list[bool]:
    """Of each GEMM of a weight's gradient, whether an operand still had its rows."""
    from tests.te_stand_in import kernels, refusals

    kernels.install()
    from megatron_ladder.mcore_compat import initialize_model_parallel

    initialize_model_parallel(ParallelConfig(), seed=0)
    check, found = refusals.gemm, []

    def watched(a: Any, b: Any, sizes: tuple[int, int, int], *args: Any) -> None:
        if refusals.is_fp8(a) and sizes[2] == BATCH * LENGTH:  # it sums over tokens
            rows = "_rowwise_data" if hasattr(a, "_rowwise_data") else "_data"
            found.append(any(getattr(x, rows) is not None for x in (a, b)))
        check(a, b, sizes, *args)

    refusals.gemm = watched
    options = {"precision": "bf16", "fp8": Fp8Config(recipe), "recompute": recompute}
    Run(model_of("ladder"), ParallelConfig(), **options)
    return found


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_are_gone_before_the_weights_gradient(
    recipe: Fp8Recipe, recompute: str, tmp_path: Path
) -> None:
    (found,) = run_ranks(1, kept_rows, recipe, recompute, tmp_path=tmp_path)
    assert found
    assert not any(found)
