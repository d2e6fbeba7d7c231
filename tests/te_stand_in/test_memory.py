"""The memory plan's counting against what the layers keep for backward, and what training holds."""

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.fp8 import Fp8Config, Fp8Recipe
from megatron_ladder.layers.attention.core import TorchAttention
from megatron_ladder.layers.attention.documents import Documents
from pretrain.plan.memory import Attention
from tests.kept import kept_by
from tests.ranks import run_ranks
from tests.te_run import LAYOUTS
from tests.te_stand_in import MARKS

pytestmark = MARKS
BATCH, LENGTH, DOCUMENT = 4, 64, 16  # two ranks have whole blocks of 128


def model_of(residual: Any, layers: int, keys: int = 2) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=128,
        ffn_hidden_size=320,
        num_attention_heads=8,
        num_query_groups=keys,
        vocab_size=512,
        residual=residual,
    )


def use_attention(attention: Attention) -> None:
    """In place of what TE's attention module would do: what `attention` keeps is kept here too."""
    import transformer_engine_torch as tex
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    def softmax(scores: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        if mask is None:  # causal
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return (scores.float() * scale).masked_fill(mask, -10000.0).softmax(-1).to(scores.dtype)

    def softmax_backward(grad: Tensor, probabilities: Tensor, scale: float) -> Tensor:
        weighted = grad.float() * probabilities.float()
        return (weighted - probabilities * weighted.sum(-1, keepdim=True)).to(grad.dtype) * scale

    tex.scaled_softmax_forward = lambda scores, scale: softmax(scores, None, scale)
    tex.scaled_masked_softmax_forward = softmax
    tex.scaled_softmax_backward = tex.scaled_masked_softmax_backward = softmax_backward

    def by_torch(query: Tensor, key: Tensor, value: Tensor, sequence_first: bool = True) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if not sequence_first:
            return out.transpose(1, 2).flatten(2)
        return out.permute(2, 0, 1, 3).flatten(2).contiguous()

    def forward(self: Any, *given: Any, packed_seq_params: Any = None, **_: Any) -> Tensor:
        query, key, value = given[:3]
        if packed_seq_params is not None:  # documents of one length: as the sequences of a batch
            qkv = [x.unflatten(0, (-1, DOCUMENT)).transpose(0, 1) for x in (query, key, value)]
            return by_torch(*qkv, sequence_first=False).flatten(0, 1)
        if attention in ("torch", "torch-unfused", "unfused"):
            kind = DotProductAttention if attention == "unfused" else TorchAttention
            own = kind(*(self.config, 1, AttnMaskType.causal, "self"))
            kernel = torch.nn.attention.SDPBackend.MATH
            one = torch.nn.attention.sdpa_kernel(kernel)
            with one if attention == "torch-unfused" else contextlib.nullcontext():
                return own(query, key, value, None)
        layout, query, key, value, *_ = utils.get_qkv_layout(query, key, value, "sbhd")
        if attention == "te-unfused":
            unfused = self.unfused_attention
            return unfused._forward({}, query, key, value, layout, attn_mask_type="causal")
        # cuDNN's writes its output as queries lie: there is no copy of it.
        return by_torch(query, key, value)

    TEDotProductAttention.forward = forward


def kept_with_fp8(forward: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """`kept_by`, with tensors in FP8, which autograd does not see."""
    from megatron_ladder.te.layers.quantised import Quantised

    init = Quantised.__init__
    all_in_fp8: weakref.WeakSet[Quantised] = weakref.WeakSet()

    def made(self: Quantised, *args: Any) -> None:
        init(self, *args)
        all_in_fp8.add(self)

    def counted() -> Tensor:
        Quantised.__init__ = made  # type: ignore[method-assign]
        loss = forward()
        Quantised.__init__ = init  # type: ignore[method-assign]
        return loss

    def in_fp8() -> list[Tensor]:
        return [x for q in all_in_fp8 for x in vars(q.tensor).values() if isinstance(x, Tensor)]

    return kept_by(counted, parameters, in_fp8)


def measure(
    residual: str,
    layout: str,
    recipes: tuple[Fp8Recipe | None, ...],
    attention: Attention = "te",
    keys: int = 2,
    halves: bool = False,
    apart: bool = False,
) -> list[str]:
    """What differs by more than 2 %, in words."""
    from tests.te_stand_in import kernels

    kernels.install((10, 0) if "mxfp8" in recipes else (9, 0))
    from megatron_ladder.mcore_compat import (
        build_gpt_model,
        initialize_model_parallel,
        transformer_config,
    )
    from pretrain.plan.memory import activation_bytes

    parallel = replace(LAYOUTS[layout], tp_overlap="halves" if halves else "none")
    initialize_model_parallel(parallel, seed=0)
    tokens = torch.randint(0, 512, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    documents = Documents(positions // DOCUMENT) if apart else None
    impl, found = "transformer_engine", []
    use_attention(attention)
    for recipe in recipes:
        for recompute in ("none", "selective", "full"):
            sizes = []
            for layers in (2, 4):  # the difference is the layers'
                model = model_of(residual, layers, keys)
                config = transformer_config(
                    *(model, parallel),
                    precision="bf16",
                    impl=impl,
                    recompute=recompute,
                    fp8=Fp8Config(recipe=recipe),
                    documents_apart=apart,
                )
                (gpt,) = build_gpt_model(model, config, impl)

                def forward(gpt: Any = gpt) -> Tensor:
                    return (
                        gpt(*(tokens, positions, None), labels=tokens, packed_seq_params=documents)
                        .float()
                        .mean()
                    )

                sizes.append(kept_with_fp8(forward, list(gpt.parameters())))
            measured = (sizes[1] - sizes[0]) / 2
            planned = activation_bytes(
                model,
                tokens=BATCH * LENGTH,
                seq_length=LENGTH,
                tp=parallel.tensor_model_parallel_size,
                sp=parallel.sequence_parallel,
                recompute=recompute,
                fp8=recipe,
                attention=attention,
                halves=halves,
                apart=apart,
            )
            if abs(measured / planned - 1) > 0.02:
                found.append(f"{recipe} {recompute}: {measured} measured, {planned} planned")
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", ["standard", "parallel", "ladder", "parallel-ladder"])
def test_what_layers_keep_is_what_is_planned(residual: str, layout: str, tmp_path: Path) -> None:
    ranks, recipes = (
        LAYOUTS[layout].tensor_model_parallel_size,
        (None, "tensorwise", "delayed", "blockwise"),
    )
    for found in run_ranks(ranks, measure, residual, layout, recipes, tmp_path=tmp_path):
        assert not found


@pytest.mark.parametrize("residual", ["standard", "parallel"])
def test_what_layers_keep_in_halves(residual: str, tmp_path: Path) -> None:
    for found in run_ranks(
        *(2, measure, residual, "tp2-sp", (None, "tensorwise"), "te", 2, True), tmp_path=tmp_path
    ):
        assert not found


@pytest.mark.parametrize("attention", ["te-unfused", "torch", "torch-unfused", "unfused"])
def test_what_layers_keep_with_other_attention(attention: Attention, tmp_path: Path) -> None:
    recipes = (None, "delayed")
    for found in run_ranks(2, measure, "ladder", "tp2", recipes, attention, tmp_path=tmp_path):
        assert not found


@pytest.mark.parametrize("attention", ["te", "te-unfused", "unfused"])
def test_what_layers_keep_with_a_key_for_each_head(attention: Attention, tmp_path: Path) -> None:
    (found,) = run_ranks(*(1, measure, "standard", "1", (None,), attention, 8), tmp_path=tmp_path)
    assert not found


@pytest.mark.parametrize("residual", ["standard", "ladder"])
def test_what_layers_keep_with_documents_apart(residual: str, tmp_path: Path) -> None:
    recipes = (None, "tensorwise", "delayed")
    arguments = (measure, residual, "tp2-sp", recipes, "te", 2, False, True)
    for found in run_ranks(2, *arguments, tmp_path=tmp_path):
        assert not found


def test_what_layers_keep_with_mxfp8(tmp_path: Path) -> None:
    for found in run_ranks(2, measure, "ladder", "tp2-sp", ("mxfp8",), tmp_path=tmp_path):
        assert not found


def measure_state(fp8: Fp8Config, moments: str) -> dict[str, tuple[float, float]]:
    """After a step: bytes measured and planned, by name."""
    from tests.te_stand_in import kernels

    kernels.install((10, 0) if fp8.recipe == "mxfp8" else (9, 0))
    from transformer_engine.pytorch.tensor import QuantizedTensor

    from megatron_ladder.mcore_compat import initialize_model_parallel
    from pretrain.config.presets import PRESETS
    from pretrain.model.setup import build
    from pretrain.plan.memory import memory_plan

    initialize_model_parallel(ParallelConfig(), seed=0)
    config = replace(
        PRESETS["debug"](),
        model=model_of("ladder", 2),
        precision="bf16",
        fp8=fp8,
        transformer_impl="transformer_engine",
    )
    config = replace(config, optimizer=replace(config.optimizer, moments=moments))
    (chunk,), optimizer, _ = build(config)
    tokens = torch.zeros(1, 32, dtype=torch.long)
    chunk(tokens, torch.arange(32)[None], None, labels=tokens).float().mean().backward()
    optimizer.step()
    (inner,) = optimizer.chained_optimizers

    def size(tensors: Any) -> float:
        return float(sum(x.nbytes for x in tensors))

    moments = [x for s in inner.optimizer.state.values() for x in s.values() if x.dim()]
    groups = inner.optimizer.param_groups
    # With moments in bf16 they are in the state, and these are the weights themselves.
    masters = [p for g in groups for p in g["params"] if p.dtype == torch.float32]
    weights = list(chunk.parameters())
    in_fp8 = [p for p in weights if isinstance(p, QuantizedTensor)]
    for module in chunk.modules():
        in_fp8 += getattr(module, "_fp8_workspaces", {}).values()
    copies = [part for copy in in_fp8 for part in copy.get_metadata().values()]
    copies = [part for part in copies if isinstance(part, Tensor) and part.dim()]
    plan = memory_plan(config, dp=1)
    return {
        "weights": (size(p for p in weights if not isinstance(p, QuantizedTensor)), plan.weights),
        "gradients": (size(p.main_grad for p in chunk.parameters()), plan.gradients),
        "optimizer": (size(moments) + size(masters), plan.optimizer),
        "fp8_weights": (size(copies), plan.fp8_weights),
    }


@pytest.mark.parametrize(
    ("fp8", "moments"),
    [
        (Fp8Config(), "fp32"),
        (Fp8Config("tensorwise"), "fp32"),
        (Fp8Config("delayed"), "fp32"),
        (Fp8Config("blockwise"), "fp32"),
        (Fp8Config("mxfp8"), "fp32"),
        (Fp8Config("tensorwise", primary_weights=True), "fp32"),
        (Fp8Config("blockwise", primary_weights=True), "fp32"),
        (Fp8Config(), "bf16"),
    ],
)
def test_what_training_holds_is_what_is_planned(
    fp8: Fp8Config, moments: str, tmp_path: Path
) -> None:
    (found,) = run_ranks(1, measure_state, fp8, moments, tmp_path=tmp_path)
    for name, (measured, planned) in found.items():
        assert measured == pytest.approx(planned, rel=0.01), name
    assert (found["fp8_weights"][0] > 0) == (fp8.recipe is not None)
