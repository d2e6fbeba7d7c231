"""Layers built of Transformer Engine's modules against megatron-core's local ones in fp32.

Those are held to the plain-PyTorch oracle by tests/distributed.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.fp8 import Fp8Config
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.skipif(find_spec("transformer_engine") is None, reason="no Transformer Engine"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run tests/gpu"),
]
KINDS: dict[str, dict[str, Any]] = {
    "standard": {"residual": "standard"},
    "parallel": {"residual": "parallel"},
    "ladder": {"residual": "ladder"},
    "last-n": {"residual": "ladder", "ladder_layers": 2},
    "desync": {"residual": "desync", "desync_interval": 2},
    "qk-norm": {"residual": "ladder", "qk_layernorm": True, "add_qkv_bias": True},
}
LAYOUTS = {
    "1": ParallelConfig(),
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "tp2-sp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
}
VOCAB, LAYERS = 512, 3
# TE's fused norm + linear, of standard layers, has the norm's weight.
FUSED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


class Run:
    """One model on one rank: its gradients and GEMMs after some passes over the same tokens."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        *,
        impl: str = "transformer_engine",
        weights: dict[str, Tensor] | None = None,
        steps: int = 1,
        recompute: str = "none",
        **options: Any,
    ) -> None:
        from megatron_ladder.mcore_compat import build_gpt_model, transformer_config
        from tests.te_stand_in import kernels

        config = transformer_config(model, parallel, impl=impl, recompute=recompute, **options)
        torch.manual_seed(0)
        (self.gpt,) = build_gpt_model(model, config, impl)
        self.own = {_name(n): p for n, p in self.gpt.named_parameters()}
        for name, weight in (weights or {}).items():
            self.own[name].data.copy_(weight)
        for _ in range(steps):
            kernels.gemms.clear()
            self.gpt.zero_grad()
            self.gpt.set_is_first_microbatch()
            self.forward().backward()
        self.gemms = list(kernels.gemms)
        self.weights = {n: p.detach().clone() for n, p in self.own.items()}
        self.gradients = {n: p.grad.float() for n, p in self.own.items() if p.grad is not None}

    def forward(self) -> Tensor:
        tokens = torch.randint(0, VOCAB, (2, 33), generator=torch.Generator().manual_seed(1))
        positions = torch.arange(32).expand(2, -1)
        losses = self.gpt(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
        return losses.float().mean()

    def worst(self, other: "Run") -> float:
        """The largest relative difference of a parameter's gradient."""
        return max(
            float((self.gradients[n] - g).norm() / g.norm()) for n, g in other.gradients.items()
        )


def _name(name: str) -> str:
    for fused, separate in FUSED.items():
        name = name.replace(fused, separate)
    return name


def model_of(kind: str) -> ModelConfig:
    return ModelConfig(
        num_layers=LAYERS,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=VOCAB,
        init_method_std=0.05,
        **KINDS[kind],
    )


def run_kind(kind: str, layout: str) -> list[str]:
    """What is wrong with it, in words."""
    from tests.te_stand_in import kernels

    kernels.install()
    from megatron_ladder.mcore_compat import initialize_model_parallel

    model, parallel = model_of(kind), LAYOUTS[layout]
    initialize_model_parallel(parallel, seed=0)
    local = Run(model, parallel, impl="local")
    found = []

    def check(what: str, holds: bool, *figures: Any) -> None:
        if not holds:
            found.append(f"{what}: {figures}")

    for recompute in ("none", "full"):
        run = Run(model, parallel, weights=local.weights, recompute=recompute)
        check(f"fp32 {recompute}", run.worst(local) < 1e-5, run.worst(local))
    bf16 = Run(model, parallel, weights=local.weights, precision="bf16")
    check("bf16", bf16.worst(local) < 0.05, bf16.worst(local))

    if kind == "standard" and parallel.sequence_parallel:
        return found  # megatron-core's own layer gathers in FP8, by more kernels than stand here

    for recipe in ("tensorwise", "delayed"):
        steps = 1 if recipe == "tensorwise" else 2 + 4 * LAYERS  # each finds one more scale
        runs = {
            recompute: Run(
                *(model, parallel),
                weights=local.weights,
                precision="bf16",
                fp8=Fp8Config(recipe=recipe),
                recompute=recompute,
                steps=steps,
            )
            for recompute in ("none", "full")
        }
        for recompute, run in runs.items():
            check(f"{recipe} {recompute}", 0.02 < run.worst(local) < 0.3, run.worst(local))
            check(f"{recipe} {recompute} GEMMs", all(fp8 for fp8, _ in run.gemms), run.gemms)
            check(
                f"{recipe} {recompute} number of GEMMs",
                len(run.gemms) == LAYERS * 4 * (3 if recompute == "none" else 4),
                len(run.gemms),
            )
        # Recomputed with the same scales: the same to the last bit.
        check(f"{recipe} recomputed", runs["full"].worst(runs["none"]) == 0)
    first = Fp8Config(
        recipe="tensorwise", num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1
    )
    some = Run(model, parallel, weights=local.weights, precision="bf16", fp8=first)
    in_fp8 = sum(fp8 for fp8, _ in some.gemms)
    check("layers in bf16", in_fp8 == (LAYERS - 2) * 4 * 3, in_fp8)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind: str, layout: str, tmp_path: Path) -> None:
    parallel = LAYOUTS[layout]
    if kind == "desync" and parallel.sequence_parallel:
        pytest.skip("desync has no sequence parallelism")
    ranks = parallel.tensor_model_parallel_size
    for found in run_ranks(ranks, run_kind, kind, layout, tmp_path=tmp_path):
        assert not found


def run_under_ddp() -> tuple[float, bool]:
    """The worst difference of gradients from those without DDP, and whether all GEMMs wrote them."""
    from tests.te_stand_in import kernels

    kernels.install()
    from megatron_ladder.mcore_compat import initialize_model_parallel
    from pretrain.optimizer import wrap_data_parallel

    model, parallel = model_of("ladder"), ParallelConfig()
    initialize_model_parallel(parallel, seed=0)
    plain = Run(model, parallel, precision="bf16")
    run = Run(model, parallel, precision="bf16", steps=0, weights=plain.weights)
    (ddp,) = wrap_data_parallel([run.gpt])
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
    return difference, all_written


def test_weight_gradients_are_added_to_ddps_buffer_by_the_gemms(tmp_path: Path) -> None:
    ((difference, all_written),) = run_ranks(1, run_under_ddp, tmp_path=tmp_path)
    assert all_written
    assert difference < 1e-2  # bf16 against fp32, which the buffer is of
