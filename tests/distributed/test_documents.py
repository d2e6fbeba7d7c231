"""Documents apart, and loss masks: a packed batch is trained on as each document by itself, in loss and
in every gradient, at layouts that cut it in all ways."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from megatron_ladder.hf.convert import megatron_to_hf
from pretrain.config.data import DataConfig
from pretrain.config.train import TrainConfig
from pretrain.loop.step import train_step, validate
from pretrain.optim.optimizer import gathered_parameters
from pretrain.run.checkpoint import load_weights
from tests.distributed.layouts import (
    BATCH,
    LENGTH,
    VOCAB,
    Layout,
    configuration,
    load_start,
    save_gradients,
    save_start,
    start,
)
from tests.expert_oracle import Cut, Oracle
from tests.gradients import assert_same_gradients
from tests.oracle import plain_model
from tests.ranks import run_ranks

LAYOUTS = [
    Layout(),
    Layout(accumulation=4, recompute="selective"),
    Layout(tp=2, sp=True, accumulation=2, recompute="full"),
    Layout(pp=2, accumulation=4),
    Layout(dp=2, accumulation=2),
    Layout(tp=2, sp=True, pp=2, accumulation=4),
    Layout(tp=2, dp=2),
    Layout(cp=2, accumulation=2, recompute="selective"),
    Layout(tp=2, sp=True, cp=2, recompute="full"),
    Layout(cp=4),
    Layout(pp=2, cp=2, accumulation=4),
]


def packed() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [BATCH, LENGTH + 1], the document of each, and whether it is trained on as a label. Some
    sequences have hardly any label: micro-batches and ranks weigh differently."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
    documents = (torch.rand(BATCH, LENGTH + 1, generator=generator) < 0.25).cumsum(1)
    share = torch.tensor([1.0, 0.9, 0.1, 0.0, 0.5, 0.5, 1.0, 0.2])[:, None]
    trained = torch.rand(BATCH, LENGTH + 1, generator=generator) < share
    trained[:, 1:] &= documents[:, 1:] == documents[:, :-1]
    return tokens, documents, trained


def packed_config(kind: str, layout: Layout) -> TrainConfig:
    data = DataConfig(seq_length=LENGTH, attend_across_documents=False)
    return replace(configuration(kind, layout), data=data)


def packed_micro_batches(config: TrainConfig) -> list[dict[str, Tensor]]:
    """This data-parallel rank's part."""
    rank = parallel_state.get_data_parallel_rank()
    size = parallel_state.get_data_parallel_world_size()
    parts = [x.chunk(size)[rank].split(config.micro_batch_size) for x in packed()]
    return [
        {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "loss_mask": trained[:, 1:].float(),
            "position_ids": torch.arange(LENGTH).expand(len(tokens), -1),
            "documents": documents[:, :-1].int(),
        }
        for tokens, documents, trained in zip(*parts, strict=True)
    ]


def run(kind: str, layouts: list[Layout], weights: Path, folder: Path) -> list[dict[str, Any]]:
    results = []
    for number, layout in enumerate(layouts):
        config = packed_config(kind, layout)
        model, optimizer, scheduler = start(config)
        load_start(model, weights)
        with gathered_parameters(model):
            validation = validate(model, packed_micro_batches(config), config)

        def before_update(*_: Any, number: int = number, model: Any = model) -> bool:
            save_gradients(model, folder / str(number))
            return True

        parts = iter(packed_micro_batches(config))
        loss, *_ = train_step(model, optimizer, scheduler, parts, config, is_good=before_update)
        results.append({"loss": loss, "validation": validation})
    return results


def oracle(logits_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean over all trained labels, of documents that a plain model sees one at a time.

    Args:
        logits_of: of [1, length] tokens: [1, length, vocabulary].
    """
    total, count = torch.zeros(()), 0
    for tokens, documents, trained in zip(*packed(), strict=True):
        for number in documents.unique():
            here = documents == number
            text, wanted = tokens[here], trained[here]
            # The last token of the sequence is a label only.
            if len(text) > 1 and wanted[1:].any():
                logits = logits_of(text[None, :-1])[0]
                losses = F.cross_entropy(logits, text[1:], reduction="none")
                total = total + losses[wanted[1:]].sum()
            count += int(wanted[1:].sum())
    return total / count


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        pytest.param("ladder", LAYOUTS, id="ladder"),
        pytest.param("windows, yarn", LAYOUTS[2:3], id="windows"),
        pytest.param("standard in halves", LAYOUTS[2:3], id="halves"),
        *(
            pytest.param(kind, LAYOUTS[::3], id=kind, marks=pytest.mark.slow)
            for kind in ("last-n", "standard", "parallel", "parallel-ladder")
        ),
        pytest.param("windows, yarn", LAYOUTS, id="windows-all", marks=pytest.mark.slow),
        pytest.param(
            *("parallel in halves", [layout for layout in LAYOUTS if layout.tp > 1]),
            id="parallel in halves",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_packed_batch_is_its_documents_one_by_one(
    kind: str, layouts: list[Layout], tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    run_ranks(1, save_start, kind, weights, tmp_path=tmp_path)
    plain = plain_model(configuration(kind).model, weights)
    expected = oracle(lambda text: plain(text).logits)
    expected.backward()
    gradients = {n: p.grad for n, p in plain.named_parameters()}
    for ranks in sorted({layout.ranks for layout in layouts}):
        group = [layout for layout in layouts if layout.ranks == ranks]
        folder = tmp_path / f"{ranks} ranks"
        by_rank = run_ranks(ranks, run, kind, group, weights, folder, tmp_path=tmp_path)
        for number, layout in enumerate(group):
            for results in by_rank:
                assert results[number]["loss"] == pytest.approx(expected.item(), abs=2e-5), layout
                assert results[number]["validation"] == pytest.approx(expected.item(), abs=2e-5)
            found = megatron_to_hf(load_weights(folder / str(number)), plain.config)
            assert_same_gradients(found, gradients, layout)


def test_documents_that_see_each_other_have_another_loss(tmp_path: Path) -> None:
    """The test above would notice."""
    weights = tmp_path / "weights"
    run_ranks(1, save_start, "ladder", weights, tmp_path=tmp_path)
    plain = plain_model(configuration("ladder").model, weights)
    tokens, _, trained = packed()
    losses = F.cross_entropy(
        plain(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    together = losses[trained[:, 1:].flatten()].mean()
    apart = oracle(lambda text: plain(text).logits)
    assert abs(together - apart) > 100 * 2e-5


@pytest.mark.parametrize(
    "layout",
    [
        Layout(cp=2, ep=2, accumulation=2),
        pytest.param(Layout(dp=2, ep=2, accumulation=2), marks=pytest.mark.slow),
        pytest.param(Layout(tp=2, sp=True, ep=2, recompute="full"), marks=pytest.mark.slow),
        pytest.param(Layout(pp=2, dp=2, ep=2, accumulation=2), marks=pytest.mark.slow),
    ],
)
def test_experts_see_documents_one_by_one(layout: Layout, tmp_path: Path) -> None:
    """Without a loss for the balance, which is that of sequences."""
    kind, weights = "expert bias", tmp_path / "weights"
    run_ranks(1, save_start, kind, weights, tmp_path=tmp_path)
    plain = Oracle(configuration(kind), load_weights(weights))
    expected = oracle(lambda text: plain.logits(text, Cut(1))[0])
    expected.backward()
    by_rank = run_ranks(layout.ranks, run, kind, [layout], weights, tmp_path, tmp_path=tmp_path)
    for (result,) in by_rank:
        assert result["loss"] == pytest.approx(expected.item(), abs=2e-5)
        assert result["validation"] == pytest.approx(expected.item(), abs=2e-5)
    found = load_weights(tmp_path / "0")
    assert_same_gradients(found.items(), plain.gradients(), layout)
