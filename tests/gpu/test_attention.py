"""Attention on a GPU: what TE and torch say they take is what runs, and no scores are kept."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.layers.attention.choice import IN_MEMORY
from megatron_ladder.layers.attention.core import TorchAttention, kernel_of_torch
from megatron_ladder.layers.attention.documents import Documents, each_by_itself
from megatron_ladder.mcore_compat import initialize_model_parallel, transformer_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
with_te = pytest.mark.skipif(
    find_spec("transformer_engine") is None, reason="no Transformer Engine"
)
HEADS, GROUPS, CHANNELS = 8, 2, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def groups() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    initialize_model_parallel(ParallelConfig(), seed=0)
    yield
    torch.use_deterministic_algorithms(False)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def config_of(length: int, **options: Any) -> Any:
    model = ModelConfig(
        num_layers=1,
        hidden_size=HEADS * CHANNELS,
        ffn_hidden_size=64,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        vocab_size=64,
        max_position_embeddings=length,
    )
    return transformer_config(model, ParallelConfig(), **options)


def inputs(length: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, and keys and values, of which the last is a view, as of the linear's output."""
    torch.manual_seed(0)
    sizes = (HEADS, GROUPS, 2 * GROUPS)
    query, key, wide = (
        torch.randn(length, 1, n, CHANNELS, device="cuda", dtype=dtype, requires_grad=True)
        for n in sizes
    )
    return [query, key, wide[:, :, :GROUPS]]


def documents_of(length: int, apart: bool = True) -> Documents | None:
    return Documents(torch.arange(length)[None] // (length // 3)) if apart else None


def module_of(config: Any, kind: Any = TorchAttention) -> Any:
    return kind(config, 1, AttnMaskType.causal, "self")


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("precision", DTYPES)
def test_torch_keeps_no_scores(precision: Any, apart: bool) -> None:
    length, dtype = 8192, DTYPES[precision]
    config = config_of(length, precision=precision, impl="local", documents_apart=apart)
    assert config.core_attention.kernel != IN_MEMORY
    attention = module_of(config)
    given = inputs(length, dtype)
    documents = documents_of(length, apart)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(*given, None, packed_seq_params=documents).float().square().sum().backward()
    taken = torch.cuda.max_memory_allocated() - before
    # Of all heads; a mask of whole sequences would be an eighth of it.
    assert taken < HEADS * length**2 * dtype.itemsize / 4


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("precision", DTYPES)
def test_the_kernel_that_torch_names_is_the_one_it_takes(
    precision: Any, apart: bool, dropout: float
) -> None:
    """Alone it gives, to the last bit, what torch gives by its own choice."""
    length, dtype = 512, DTYPES[precision]
    config = config_of(length, precision=precision, impl="local", documents_apart=apart)
    config.attention_dropout = dropout
    attention, given = module_of(config), inputs(length, dtype)
    documents = documents_of(length, apart)

    def attend() -> Tensor:
        if documents is None:
            return attention(*given, None)
        return each_by_itself(attention.attend, documents, *given)

    kernel = kernel_of_torch(
        *((1, HEADS, length, CHANNELS), GROUPS, dtype), apart=apart, dropout=dropout
    )
    names = {"efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
    backend = getattr(SDPBackend, names.get(kernel, f"{kernel.upper()}_ATTENTION"))
    outputs = []
    for allowed in (None, backend):
        torch.manual_seed(1)
        initialize_rng()
        if allowed is None:
            outputs.append(attend())
        else:
            with sdpa_kernel(allowed):
                outputs.append(attend())
    assert torch.equal(*outputs)


def initialize_rng() -> None:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@with_te
@pytest.mark.parametrize(
    ("precision", "apart", "deterministic"),
    [("bf16", False, False), ("bf16", True, False), ("fp32", False, False), ("bf16", False, True)],
)
def test_what_transformer_engine_says_is_what_it_takes(
    precision: Any, apart: bool, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention import (
        _attention_backends as taken,
    )

    from megatron_ladder.te.attention import parameters
    from megatron_ladder.te.layers.documents import TEDocumentsAttention

    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", str(int(not deterministic)))
    torch.use_deterministic_algorithms(deterministic)  # --deterministic does both
    length, dtype = 1024, DTYPES[precision]
    config = config_of(
        length,
        precision=precision,
        attention="te",
        documents_apart=apart,
        impl="transformer_engine",
        deterministic=deterministic,
    )
    documents = documents_of(length, apart)
    given = inputs(length, dtype)
    found = []
    for kind in (TEDocumentsAttention, TorchAttention):
        attention = module_of(config, kind)
        output = attention(
            *(*given, None), attn_mask_type=AttnMaskType.causal, packed_seq_params=documents
        )
        weights = torch.linspace(-1, 1, output.numel(), device="cuda").view(output.shape)
        gradients = torch.autograd.grad((output.float() * weights).sum(), given)
        found.append((output, *gradients))

    asked = parameters(config, micro_batch_size=1, seq_length=length, apart=apart)
    if documents is not None:  # which documents a batch has, the question cannot know
        row = documents.in_one_row(given[0].device)
        known = {"max_seqlen_q": row.max_seqlen_q, "max_seqlen_kv": row.max_seqlen_kv}
        asked = replace(asked, batch_size=len(row.cu_seqlens_q) - 1, **known)
    assert asked == taken["attention_params"]
    core = config.core_attention
    runs_fused = bool(taken["use_fused_attention"] or taken["use_flash_attention"])
    assert (core.kernel != IN_MEMORY) == runs_fused, core
    assert ("cuDNN" in core.kernel) == bool(taken["use_fused_attention"]), core
    auto = config_of(
        length,
        precision=precision,
        documents_apart=apart,
        impl="transformer_engine",
        deterministic=deterministic,
    ).core_attention
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    torch_has_cudnn = hopper and precision == "bf16" and not (apart or deterministic)
    assert auto.whose == ("te" if runs_fused and not torch_has_cudnn else "torch")
    assert auto.kernel != IN_MEMORY
    # bf16 has 8 bits; fp32's GEMMs may be TF32's.
    for ours, theirs in zip(*found[::-1], strict=True):
        assert relative(ours, theirs) < 0.02


def test_torch_is_repeatable_where_that_is_asked_for() -> None:
    torch.use_deterministic_algorithms(True)
    for apart in (False, True):
        length, dtype = 2048, torch.bfloat16
        config = config_of(length, precision="bf16", impl="local", documents_apart=apart)
        assert config.core_attention.kernel != IN_MEMORY
        attention, given = module_of(config), inputs(length, dtype)
        documents = documents_of(length, apart)
        runs = []
        for _ in range(3):
            loss = attention(*given, None, packed_seq_params=documents).float().square().sum()
            runs.append(torch.autograd.grad(loss, given))
        for again in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))
