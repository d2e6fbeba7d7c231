"""Torch's attention against megatron-core's own, which keeps scores: loss and every gradient, in fp32."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_ladder.config import ParallelConfig
from megatron_ladder.layers.attention import TorchAttention, as_bias
from megatron_ladder.layers.window import in_window
from megatron_ladder.mcore_compat import initialize_model_parallel, transformer_config
from pretrain.config.train import DataConfig
from pretrain.loop.step import document_mask, train_step
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
    assert type(core) is {"torch": TorchAttention, "unfused": DotProductAttention}[attention]
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
        *(pytest.param(k, 2, marks=pytest.mark.slow) for k in ("parallel", "last-n", "standard")),
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
    return [
        c(config, 2, AttnMaskType.causal, "self") for c in (TorchAttention, DotProductAttention)
    ]


def of_both(
    pair: list[Any], queries: int, keys: int, mask: Tensor | None
) -> list[tuple[Tensor, ...]]:
    """Output, and gradients of queries, keys and values, of each module of a pair."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(length, 3, heads, 6, generator=generator, requires_grad=True)
        for length, heads in ((queries, 4), (keys, 2), (keys, 2))
    ]
    found = []
    for module in pair:
        output = module(*inputs, mask)
        weights = torch.arange(output.numel()).view(output.shape).cos()
        found.append((output, *torch.autograd.grad((output * weights).sum(), inputs)))
    return found


def documents_in_a_window() -> list[tuple[Tensor, ...]]:
    """megatron-core's drops a mask where there is a window, so there the mask has the window in it."""
    documents = torch.rand(3, 300, generator=torch.Generator().manual_seed(4)).lt(0.1).cumsum(1)
    mask = document_mask(documents)
    both = mask | ~in_window(300, 300, 40, mask.device)
    ours, theirs = modules(window_size=(39, 0))[0], modules()[1]
    (found,), (expected,) = of_both([ours], 300, 300, mask), of_both([theirs], 300, 300, both)
    (added,) = of_both([ours], 300, 300, as_bias(mask, torch.float32))
    for one, other in zip(found, added, strict=True):
        torch.testing.assert_close(one, other)
    return [found, expected]


def odd_cases() -> dict[str, float]:
    initialize_model_parallel(ParallelConfig(), seed=0)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(3, 1, 7, 9, generator=generator) < 0.5
    mask[..., 0] = False
    found = {
        "one query": of_both(modules(), 1, 9, None),
        "a mask": of_both(modules(), 7, 9, mask),
        "one mask for all": of_both(modules(), 7, 9, mask[:1]),
        "another scale": [],
        "a window": of_both(modules(window_size=(2, 0)), 7, 7, None),
        "a window, in blocks": of_both(modules(window_size=(99, 0)), 300, 300, None),
        "a window, one query": of_both(modules(window_size=(2, 0)), 1, 9, None),
        "a window longer than the sequence": of_both(modules(window_size=(9, 0)), 7, 7, None),
        "a window in another layer": of_both(
            modules(window_size=(2, 0), window_attn_skip_freq=[True, False]), 7, 7, None
        ),
        "documents in a window": documents_in_a_window(),
        "softmax off by one": of_both(modules(softmax_type="off-by-one"), 7, 7, None),
        "scores over the layer's number": of_both(
            modules(apply_query_key_layer_scaling=True), 7, 7, None
        ),
    }
    pair = modules()
    for module in pair:
        module.softmax_scale = 0.9
    found["another scale"] = of_both(pair, 7, 7, None)
    ours = modules()[0]
    found["what is added"] = [
        of_both([ours], 7, 9, m)[0] for m in (mask, as_bias(mask, torch.float32))
    ]
    # Traced for any length, of which a single query is not one.
    traced = [torch.compile(ours, backend="eager", fullgraph=True, dynamic=True), ours]
    found |= {f"{n} traced": of_both(traced, n, 9, None) for n in (9, 1)}
    for module in modules():
        with pytest.raises(AssertionError, match="causal"):
            of_both([module], 2, 9, None)
    return {
        name: max(float((a - b).abs().max()) for a, b in zip(*pair, strict=True))
        for name, pair in found.items()
    }


def test_masks_lengths_and_options(tmp_path: Path) -> None:
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
    bias = as_bias(torch.ones(1, 1, length, length, dtype=torch.bool).triu(1), torch.float32)
    found = {}
    for name, masks in {"causal": (None, None), "a mask": (bias, bias < 0)}.items():
        sizes = []
        for module, mask in zip(modules(), masks, strict=True):
            saved: dict[int, int] = {}

            def keep(x: Tensor, saved: dict[int, int] = saved) -> Tensor:
                saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                output = module(*inputs, mask)
            saved.pop(bias.untyped_storage().data_ptr(), None)  # one for all layers
            sizes.append(sum(saved.values()))
            del output
        found[name] = [*sizes, 4 * length**2 * 4]
    return found


def test_no_scores_are_kept(tmp_path: Path) -> None:
    (found,) = run_ranks(1, kept, tmp_path=tmp_path)
    for name, (ours, theirs, scores) in found.items():
        assert ours < scores / 10 < scores <= theirs, name
