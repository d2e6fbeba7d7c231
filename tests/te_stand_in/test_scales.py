"""The scales of delayed scaling: what a validation does to them."""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from megatron_ladder.fp8 import Fp8Config
from tests.ranks import run_ranks
from tests.te_run import LAYOUTS, Run, model_of
from tests.te_stand_in import MARKS

pytestmark = MARKS


def changed_by_a_validation() -> dict[str, bool]:
    """Whether scales or histories change by a forward pass with larger activations."""
    from tests.te_stand_in import kernels

    kernels.install()
    from megatron_ladder.mcore_compat import initialize_model_parallel
    from megatron_ladder.te.scales import _scales, scales_kept

    initialize_model_parallel(LAYOUTS["1"], seed=0)
    fp8 = Fp8Config(recipe="delayed")
    run = Run(model_of("ladder"), LAYOUTS["1"], precision="bf16", fp8=fp8, steps=2)

    def scales() -> list[Tensor]:
        linears = [m for m in run.gpt.modules() if "scaling_fwd" in getattr(m, "fp8_meta", {})]
        assert linears
        return [x.clone() for linear in linears for x in _scales(linear)]

    run.gpt.eval()
    found = {}
    with torch.no_grad():
        for layer in run.gpt.decoder.layers:
            layer.input_layernorm.weight.mul_(8)
        for name, kept in {"kept": scales_kept([run.gpt]), "not kept": nullcontext()}.items():
            before = scales()
            with kept:
                run.forward()
            found[name] = not all(map(torch.equal, before, scales()))
    return found


def test_a_validation_leaves_the_scales_as_they_were(tmp_path: Path) -> None:
    (found,) = run_ranks(1, changed_by_a_validation, tmp_path=tmp_path)
    assert found["not kept"]  # there is something to keep
    assert not found["kept"]
