"""Torch's attention against megatron-core's own, which keeps scores: loss and every gradient, in fp32."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_ladder.config import ParallelConfig
from megatron_ladder.layers.attention.core import TorchAttention, UnfusedAttention
from megatron_ladder.layers.attention.documents import Documents
from megatron_ladder.mcore_compat import initialize_model_parallel, transformer_config
from pretrain.config.data import DataConfig
from pretrain.loop.step import train_step
from tests.distributed.layouts import LENGTH, Layout, configuration, start
from tests.distributed.test_documents import packed_micro_batches
from tests.ranks import run_ranks

LAYOUTS = [
    Layout(),
    Layout(recompute="selective"),
    Layout(tp=2),
    Layout(tp=2, sp=True, recompute="selective"),
    Layout(tp=2, recompute="full"),
    Layout(tp=2, sp=True, recompute="full"),
    Layout(cp=2, recompute="selective"),
]


def one_step(kind: str, layout: Layout, attention: Any, apart: bool) -> dict[str, Tensor]:
    """The loss of a step and the gradients it made."""
    config = configuration(kind, layout)
    config = replace(
        config,
        model=replace(config.model, num_query_groups=2),
        data=DataConfig(seq_length=LENGTH, attend_across_documents=not apart),
        attention=attention,
    )
    model, optimizer, scheduler = start(config)
    core = model[0].module.decoder.layers[0].self_attention.core_attention
    assert type(core) is {"torch": TorchAttention, "unfused": UnfusedAttention}[attention]
    batches = packed_micro_batches(config)
    if not apart:
        for batch in batches:
            del batch["documents"]
    loss = train_step(model, optimizer, scheduler, iter(batches), config)[0]
    found = {n: p.main_grad.clone() for n, p in model[0].module.named_parameters()}
    return found | {"loss": torch.tensor(loss)}


def differences(kind: str, layouts: list[Layout]) -> dict[str, float]:
    """The largest of a parameter's gradient or of the loss, over its size."""
    found = {}
    for layout in layouts:
        for apart in (False, True):
            ours, theirs = (one_step(kind, layout, a, apart) for a in ("torch", "unfused"))
            sizes = [float((ours[n] - x).norm() / x.norm()) for n, x in theirs.items()]
            found[f"{layout}, documents {'apart' if apart else 'together'}"] = max(sizes)
    return found


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        ("standard", 1),
        ("ladder", 2),
        *(
            pytest.param(k, 2, marks=pytest.mark.slow)
            for k in ("parallel", "last-n", "standard", "parallel-ladder")
        ),
    ],
)
def test_torchs_attention_trains_as_megatron_cores(kind: str, ranks: int, tmp_path: Path) -> None:
    layouts = [layout for layout in LAYOUTS if layout.ranks == ranks]
    for found in run_ranks(ranks, differences, kind, layouts, tmp_path=tmp_path):
        assert max(found.values()) < 1e-5, found


def modules(**options: Any) -> list[Any]:
    """Ours and megatron-core's, of 4 heads of 6 channels and 2 of keys, on all ranks together."""
    model = replace(configuration("ladder").model, hidden_size=24, num_query_groups=2)
    config = transformer_config(
        model, ParallelConfig(tensor_model_parallel_size=torch.distributed.get_world_size())
    )
    for name, value in options.items():
        setattr(config, name, value)
    return [c(config, 2, AttnMaskType.causal, "self") for c in (TorchAttention, UnfusedAttention)]


def of_both(
    pair: list[Any], queries: int, keys: int, documents: Documents | None = None
) -> list[tuple[Tensor, ...]]:
    """Output, and gradients of queries, keys and values, of each module of a pair."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(length, 3, heads, 6, generator=generator, requires_grad=True)
        for length, heads in ((queries, 4), (keys, 2), (keys, 2))
    ]
    found = []
    for module in pair:
        output = module(*inputs, None, packed_seq_params=documents)
        weights = torch.arange(output.numel()).view(output.shape).cos()
        found.append((output, *torch.autograd.grad((output * weights).sum(), inputs)))
    return found


def odd_cases() -> dict[str, float]:
    initialize_model_parallel(ParallelConfig(), seed=0)
    long = Documents(torch.tensor([[0] * 300, [0] * 140 + [1] * 160, [0] * 260 + [1] * 40]))
    apart = Documents(torch.tensor([[0] * 3 + [1] * 4, [0, 1, 1, 1, 2, 3, 3], [5] * 7]))
    found = {
        "one query": of_both(modules(), 1, 9),
        "the last queries": of_both(modules(), 4, 9),
        "the last queries, a window": of_both(modules(window_size=(2, 0)), 4, 9),
        "the last queries, a window, in blocks": of_both(modules(window_size=(99, 0)), 200, 300),
        "documents": of_both(modules(), 7, 7, apart),
        "another scale": [],
        "a window": of_both(modules(window_size=(2, 0)), 7, 7),
        "a window, in blocks": of_both(modules(window_size=(99, 0)), 300, 300),
        "a long window, in blocks": of_both(modules(window_size=(149, 0)), 400, 400),
        "a window, one query": of_both(modules(window_size=(2, 0)), 1, 9),
        "a window longer than the sequence": of_both(modules(window_size=(9, 0)), 7, 7),
        "a window in another layer": of_both(
            modules(window_size=(2, 0), window_attn_skip_freq=[True, False]), 7, 7
        ),
        "a window in documents": of_both(modules(window_size=(2, 0)), 7, 7, apart),
        "a window in documents, in blocks": of_both(modules(window_size=(99, 0)), 300, 300, long),
        "softmax off by one": of_both(modules(softmax_type="off-by-one"), 7, 7),
        "scores over the layer's number": of_both(
            modules(apply_query_key_layer_scaling=True), 7, 7
        ),
    }
    pair = modules()
    for module in pair:
        module.softmax_scale = 0.9
    found["another scale"] = of_both(pair, 7, 7)
    ours = modules()[0]
    # Traced for any length, of which a single query is not one.
    traced = [torch.compile(ours, backend="eager", fullgraph=True, dynamic=True), ours]
    found |= {f"{n} traced": of_both(traced, n, 9) for n in (9, 1)}
    return {
        name: max(float((a - b).abs().max()) for a, b in zip(*pair, strict=True))
        for name, pair in found.items()
    }


def test_documents_lengths_and_options(tmp_path: Path) -> None:
    (found,) = run_ranks(1, odd_cases, tmp_path=tmp_path)
    assert max(found.values()) < 1e-5, found


def dropped() -> dict[str, Any]:
    """With values of one, each output is the share of its weights that are left, times two."""
    initialize_model_parallel(ParallelConfig(tensor_model_parallel_size=2), seed=0)
    ours = modules(attention_dropout=0.5)[0]
    shared = torch.get_rng_state()
    query = torch.randn(16, 2, 2, 6, generator=torch.Generator().manual_seed(0))
    value = torch.ones(16, 2, 1, 6, requires_grad=True)

    def attend(value: Tensor) -> Tensor:
        return ours(query, query[:, :, :1], value, None)

    output = tensor_parallel.checkpoint(attend, False, value)
    output.sum().backward()
    assert value.grad is not None
    ours.eval()
    return {
        "output": output.detach(),
        "kept": (float(value.grad.sum()), float(output.sum())),
        "shared states": torch.equal(shared, torch.get_rng_state()),
        "evaluated": attend(value).detach(),
    }


def test_ranks_drop_by_themselves_and_recomputation_drops_the_same(tmp_path: Path) -> None:
    first, second = run_ranks(2, dropped, tmp_path=tmp_path)
    for found in (first, second):
        assert found["shared states"]
        assert found["output"].std() > 0.1
        torch.testing.assert_close(found["evaluated"], torch.ones(16, 2, 12))
        # A value's gradient is the sum of the weights it had in the recomputed pass.
        assert found["kept"][0] == pytest.approx(found["kept"][1], rel=1e-5)
    assert not torch.equal(first["output"], second["output"])


def kept() -> dict[str, list[int]]:
    """Bytes that each of the two modules keeps for backward, and what scores of all heads take."""
    initialize_model_parallel(ParallelConfig(), seed=0)
    length = 256
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(length, 1, heads, 6, generator=generator, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    apart = Documents(torch.arange(length)[None] // 64)
    found = {}
    for name, documents in {"causal": None, "documents": apart}.items():
        sizes = []
        for module in modules():
            saved: dict[int, int] = {}

            def keep(x: Tensor, saved: dict[int, int] = saved) -> Tensor:
                saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                output = module(*inputs, None, packed_seq_params=documents)
            sizes.append(sum(saved.values()))
            del output
        found[name] = [*sizes, 4 * length * (64 if documents else length) * 4]
    return found


def test_no_scores_are_kept(tmp_path: Path) -> None:
    (found,) = run_ranks(1, kept, tmp_path=tmp_path)
    for name, (ours, theirs, scores) in found.items():
        assert scores <= theirs < 4 * scores, name  # those of a document's own tokens
        assert ours < (scores / 10 if name == "causal" else scores), name
