"""The scales of delayed scaling: what a validation does to them, and what a resumed run has of them."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_ladder.fp8 import Fp8Config, Fp8Recipe
from tests.distributed.layouts import configuration
from tests.distributed.test_halves import there_and_back
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


def resumed_in_halves(recipe: Fp8Recipe | None, folder: Path) -> list[tuple[dict, dict]]:
    """A run of Transformer Engine's own standard layers, resumed in halves, and the other way round."""
    from tests.te_stand_in import kernels

    kernels.install()
    config = configuration("standard")
    model = replace(config.model, hidden_size=64, ffn_hidden_size=64)
    fp8 = Fp8Config(recipe=recipe)
    # Two sequences of LENGTH are no whole blocks of FP8.
    data = replace(config.data, seq_length=8)
    options = {"model": model, "data": data, "precision": "bf16", "fp8": fp8}
    return there_and_back("standard", True, "none", folder, **options)


@pytest.mark.parametrize("recipe", [None, "delayed", "tensorwise"])
def test_a_run_goes_on_in_halves_with_its_scales(recipe: Fp8Recipe | None, tmp_path: Path) -> None:
    for found in run_ranks(2, resumed_in_halves, recipe, tmp_path / "runs", tmp_path=tmp_path):
        for before, after in found:
            for name, weight in before["weights"].items():
                assert torch.equal(after["weights"][name], weight), name
            for name, scales in before["scales"].items():
                assert torch.equal(after["scales"][name], scales), name
                assert (scales.numel() > 1000) == (recipe == "delayed")  # histories
            assert after["numbers"] == pytest.approx(before["numbers"], rel=3e-2)
