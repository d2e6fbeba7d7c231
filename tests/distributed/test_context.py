"""Context parallelism: attention over ranks is that of one rank, and a bad step is written down whole.

test_layouts.py and test_documents.py train whole models so.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_ladder.config import ParallelConfig
from megatron_ladder.layers.attention.context import tokens_of
from megatron_ladder.layers.attention.core import TorchAttention, UnfusedAttention
from megatron_ladder.layers.attention.documents import Documents
from megatron_ladder.mcore_compat import initialize_model_parallel, transformer_config
from pretrain.loop.bad_steps import BadSteps
from pretrain.loop.saving import CheckpointSaver
from pretrain.loop.step import train_step
from tests.distributed.layouts import Layout, batches, configuration, micro_batches, start
from tests.ranks import run_ranks

LENGTH, WINDOW = 48, 7


def rows(x: Tensor) -> Tensor:
    """This rank's rows of [s, b, ...]."""
    return tokens_of(x.transpose(0, 1), dist.get_rank(), dist.get_world_size()).transpose(0, 1)


def differences() -> dict[str, float]:
    """Of this rank's rows of the output, and of the gradients of queries, keys and values."""
    context = ParallelConfig(context_parallel_size=dist.get_world_size())
    initialize_model_parallel(context, seed=0)
    model = replace(configuration("ladder").model, hidden_size=24, num_query_groups=2)
    generator = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(LENGTH, 3, heads, 6, generator=generator, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    mine = [rows(x.detach()).requires_grad_() for x in whole]
    numbers = (torch.rand(3, LENGTH, generator=generator) < 0.15).cumsum(1)
    found = {}
    for kind in (TorchAttention, UnfusedAttention):
        for window in (None, WINDOW):
            for documents in (None, Documents(numbers)):
                outputs = []
                for inputs, parallel in ((whole, ParallelConfig()), (mine, context)):
                    config = transformer_config(model, parallel)
                    config.window_size = window and (window - 1, 0)
                    module = kind(config, 2, AttnMaskType.causal, "self")
                    outputs.append(module(*inputs, None, packed_seq_params=documents))
                weights = torch.arange(outputs[0].numel()).view(outputs[0].shape).cos()
                expected = torch.autograd.grad((outputs[0] * weights).sum(), whole)
                ours = torch.autograd.grad((outputs[1] * rows(weights)).sum(), mine)
                pairs = zip((outputs[1], *ours), (outputs[0], *expected), strict=True)
                case = f"{kind.__name__}, window {window}, documents {documents is not None}"
                found[case] = max(float((x - rows(y)).abs().max()) for x, y in pairs)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_attention_over_ranks_is_that_of_one(ranks: int, tmp_path: Path) -> None:
    for found in run_ranks(ranks, differences, tmp_path=tmp_path):
        assert len(found) == 8
        assert max(found.values()) < 1e-5, found


def bad_step(layout: Layout, folder: Path) -> list[dict[str, Any]]:
    """What is written down of a step that is found bad."""
    config = replace(configuration("ladder", layout), output_dir=folder)
    model, optimizer, scheduler = start(config)
    folder.mkdir(exist_ok=True)
    bad = BadSteps(config, Mock(spec=CheckpointSaver, newest=lambda: None), ())

    def is_good(_: float, *figures: Any) -> bool:
        return bad.is_good(1, math.nan, *figures)

    parts = iter(micro_batches(batches()[0], config))
    train_step(model, optimizer, scheduler, parts, config, is_good=is_good)
    dist.barrier()
    return json.loads((folder / "bad_steps" / "step_1.json").read_text())["micro_batches"]


def test_a_bad_step_lists_each_micro_batch_once_and_whole(tmp_path: Path) -> None:
    one, two = Layout(accumulation=4), Layout(cp=2, accumulation=4)
    (expected,) = run_ranks(1, bad_step, one, tmp_path / "one", tmp_path=tmp_path)
    found, _ = run_ranks(2, bad_step, two, tmp_path / "two", tmp_path=tmp_path)
    assert [m["samples"] for m in found] == [m["samples"] for m in expected]
    assert [m["loss"] for m in found] == pytest.approx([m["loss"] for m in expected], abs=1e-6)
