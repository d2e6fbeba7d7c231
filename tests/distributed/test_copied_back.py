"""Collectives whose backend writes their results by copies that autograd counts, as gloo does for a GPU's
tensors, whenever it gets to it: losses and gradients are the unsharded oracle's, in fp32.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ladder.collectives.points import SubmoduleCollectives, output_start, output_wait
from megatron_ladder.config import ParallelConfig
from megatron_ladder.hf.convert import megatron_to_hf
from megatron_ladder.mcore_compat import initialize_model_parallel
from pretrain.loop.step import train_step
from pretrain.run.checkpoint import load_weights
from tests import gpu_gloo
from tests.distributed.layouts import (
    Layout,
    batches,
    configuration,
    load_start,
    micro_batches,
    save_gradients,
    save_start,
    start,
)
from tests.distributed.test_layouts import LOSS_TOLERANCE
from tests.gradients import assert_same_gradients
from tests.oracle import plain_model, train_losses
from tests.ranks import run_ranks

TP, SP = Layout(tp=2), Layout(tp=2, sp=True)
LAYOUTS = {
    "ladder": [TP, SP, Layout(tp=2, recompute="full"), Layout(tp=2, sp=True, recompute="full")],
    "list": [TP],
    "parallel": [TP, SP],
    "parallel-ladder": [TP, SP, Layout(tp=2, sp=True, recompute="full")],
    "desync": [TP],
}
ENDS: tuple[gpu_gloo.Ends, ...] = ("at once", "when waited for")


def one_step(
    kind: str, layouts: list[Layout], ends: gpu_gloo.Ends, weights: Path, folder: Path
) -> list[float]:
    """The loss of each; gradients go to `folder`."""
    gpu_gloo.install(ends)
    losses = []
    for number, layout in enumerate(layouts):
        config = configuration(kind, layout)
        model, optimizer, scheduler = start(config)
        load_start(model, weights)

        def before_update(*_: Any, to: Path = folder / str(number), model: Any = model) -> bool:
            save_gradients(model, to)
            return True

        parts = iter(micro_batches(batches()[0], config))
        loss, *_ = train_step(model, optimizer, scheduler, parts, config, is_good=before_update)
        losses.append(loss)
    return losses


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_step_is_the_oracles(kind: str, tmp_path: Path) -> None:
    weights, layouts = tmp_path / "weights", LAYOUTS[kind]
    run_ranks(1, save_start, kind, weights, tmp_path=tmp_path)
    config = configuration(kind)
    plain = plain_model(config.model, weights)
    (expected,), gradients = train_losses(plain, config, 2, [batches()[0]])
    for ends in ENDS:
        folder = tmp_path / ends
        by_rank = run_ranks(2, one_step, kind, layouts, ends, weights, folder, tmp_path=tmp_path)
        for number, layout in enumerate(layouts):
            for losses in by_rank:
                assert losses[number] == pytest.approx(expected, abs=LOSS_TOLERANCE), layout
            found = megatron_to_hf(load_weights(folder / str(number)), plain.config)
            assert_same_gradients(found, gradients, (ends, layout))


class Keep(torch.autograd.Function):
    """A function that saves its input, here one that is in flight, and reads it in backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return ctx.saved_tensors[0]


def save_in_flight(sp: bool, ends: gpu_gloo.Ends) -> bool:
    """Whether a sum of the ranks' outputs is there in backward, saved before it had arrived."""
    gpu_gloo.install(ends)
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sp)
    initialize_model_parallel(parallel, seed=0)
    group = parallel_state.get_tensor_model_parallel_group()
    x = torch.randn(4, 1, 8, requires_grad=True)
    whole = (2 * x.detach()).chunk(2)[group.rank()] if sp else 2 * x.detach()
    y = output_start(x * 1, SubmoduleCollectives(group, sp))
    kept = Keep.apply(y)
    total = output_wait(y)
    grads = torch.autograd.grad((total, kept), y, (torch.zeros_like(total), torch.ones(())))
    return torch.equal(grads[0], whole)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("sp", [False, True])
def test_what_is_in_flight_may_be_saved(sp: bool, ends: gpu_gloo.Ends, tmp_path: Path) -> None:
    assert run_ranks(2, save_in_flight, sp, ends, tmp_path=tmp_path) == [True, True]


def two_steps_in_bf16(layouts: list[Layout], ends: gpu_gloo.Ends | None) -> list[list[float]]:
    """Losses: the second step's depends on the first's gradients."""
    if ends is not None:
        gpu_gloo.install(ends)
    losses = []
    for layout in layouts:
        config = replace(configuration("ladder", layout), precision="bf16")
        model, optimizer, scheduler = start(config)
        parts = [part for tokens in batches()[:2] for part in micro_batches(tokens, config)]
        data = iter(parts)
        losses.append([train_step(model, optimizer, scheduler, data, config)[0] for _ in range(2)])
    return losses


def test_bf16_trains_as_with_gloos_own(tmp_path: Path) -> None:
    layouts = LAYOUTS["ladder"]
    expected, at_once, late = (
        run_ranks(2, two_steps_in_bf16, layouts, ends, tmp_path=tmp_path) for ends in (None, *ENDS)
    )
    assert at_once == late == expected
