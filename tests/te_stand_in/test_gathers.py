"""Sequence parallelism in FP8: what ladder layers gather, and when they start to sum."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ladder.fp8 import Fp8Config
from tests.ranks import run_ranks
from tests.te_run import LAYERS, LAYOUTS, Run, model_of
from tests.te_stand_in import MARKS

pytestmark = MARKS


def watch(layout: str, fp8: Fp8Config, recompute: str) -> dict[str, Any]:
    """Of one forward and backward of a ladder model."""
    from tests.te_stand_in import kernels

    kernels.install()
    from megatron_ladder.collectives.names import ALL_GATHER
    from megatron_ladder.collectives.points import SubmoduleCollectives
    from megatron_ladder.mcore_compat import initialize_model_parallel

    model, parallel = model_of("ladder"), LAYOUTS[layout]
    initialize_model_parallel(parallel, seed=0)
    options = {"precision": "bf16", "fp8": fp8, "recompute": recompute}
    run = Run(model, parallel, steps=0, **options)
    seen: dict[str, Any] = {"gathers": [], "backward's gathers": [], "at start": []}
    phase = "gathers"
    gather = torch.distributed.all_gather_into_tensor
    start = SubmoduleCollectives.start_input_gradient

    def watched(out: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen[phase].append(x.dtype)
        return gather(out, x, *args, **kwargs)

    def started(self: Any, grad: torch.Tensor) -> None:
        seen["at start"].append((len(kernels.gemms), len(kernels.gemm_weights)))
        start(self, grad)

    for name in ("all_gather_into_tensor", ALL_GATHER):
        setattr(torch.distributed, name, watched)
    SubmoduleCollectives.start_input_gradient = started  # type: ignore[method-assign]
    kernels.norms.clear()
    loss = run.forward()
    seen["norms"] = list(kernels.norms)
    phase = "backward's gathers"
    kernels.gemms.clear(), kernels.gemm_weights.clear()
    loss.backward()
    return seen


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_ladder_layers_gather_fp8(recipe: Any, recompute: str, tmp_path: Path) -> None:
    for seen in run_ranks(
        2, watch, "tp2-sp", Fp8Config(recipe=recipe), recompute, tmp_path=tmp_path
    ):
        assert seen["gathers"] == [torch.uint8] * 2 * LAYERS
        # Of each sub-module the gradient of its output, and its input again.
        assert seen["backward's gathers"] == [torch.uint8] * 4 * LAYERS
        # All write FP8 but the model's last.
        assert seen["norms"] == [True] * 2 * LAYERS + [False]


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp"])
def test_sums_of_input_gradients_start_before_the_weights_gradient(
    layout: str, tmp_path: Path
) -> None:
    for seen in run_ranks(2, watch, layout, Fp8Config("tensorwise"), "none", tmp_path=tmp_path):
        # Of four GEMMs a sub-module, two of weights, the last is to come.
        expected = [(4 * i + 3, 2 * i + 1) for i in range(2 * LAYERS)]
        assert seen["at start"] == expected


def test_norms_write_fp8_without_ranks_too(tmp_path: Path) -> None:
    fp8 = Fp8Config("tensorwise", num_layers_at_end_in_bf16=1)
    (seen,) = run_ranks(1, watch, "1", fp8, "none", tmp_path=tmp_path)
    assert seen["norms"] == [True] * 2 * (LAYERS - 1) + [False] * 3


def gathered(recipe: Any) -> list[float]:
    """Relative errors of a norm's output and of an output's gradient, gathered in FP8 from two ranks, whose
    parts differ tenfold and more in size."""
    from tests.te_stand_in import kernels

    kernels.install()
    from megatron.core.fp8_utils import get_fp8_context

    from megatron_ladder.collectives.placeholder import fp8_of
    from megatron_ladder.mcore_compat import initialize_model_parallel

    model, parallel = model_of("ladder"), LAYOUTS["tp2-sp"]
    initialize_model_parallel(parallel, seed=0)
    run = Run(model, parallel, precision="bf16", fp8=Fp8Config(recipe=recipe))
    layer = run.gpt.decoder.layers[1]
    # A norm makes of equal numbers ones, and of a single one the root of the width.
    width, tokens = model.hidden_size, 128
    ranks = [torch.ones(tokens, 1, width), torch.eye(width)[:tokens, None]]
    gradients = [torch.full((tokens, 1, width), 100.0**r) for r in range(2)]
    own, group = layer.tp_group.rank(), layer.tp_group
    with torch.no_grad(), get_fp8_context(layer.config):
        linear = layer.self_attention.linear_qkv
        parts = [
            layer._normalised(ranks[own].bfloat16(), layer.input_layernorm, linear),
            layer.mlp.linear_fc2.output_gradient(gradients[own].bfloat16(), group),
        ]
    errors = []
    normed = [x * width**0.5 / x.norm(dim=-1, keepdim=True) for x in ranks]
    for part, expected in zip(parts, (normed, gradients), strict=True):
        fp8: Any = fp8_of(part)
        whole, work = fp8.all_gather(group, rows=True, columns=False)
        work.wait()
        for x, y in zip(kernels.plain(whole.tensor).chunk(2), expected, strict=True):
            errors.append(float((x.view_as(y) - y).norm() / y.norm()))
    return errors


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_ranks_quantise_to_what_they_can_put_together(recipe: str, tmp_path: Path) -> None:
    """One scale a tensor is one for all ranks; scales of blocks are gathered too."""
    for errors in run_ranks(2, gathered, recipe, tmp_path=tmp_path):
        assert max(errors) < 0.13  # half a step of e5m2, which gradients are in, is 1/8
