"""The linears' weights in FP8 alone, on one rank and on two that share the optimizer's state."""

from pathlib import Path

import pytest
import torch

from megatron_ladder.fp8 import Fp8Config
from tests.ranks import run_ranks
from tests.te_run import model_of
from tests.te_stand_in import MARKS

pytestmark = MARKS
STEPS, BATCH, LENGTH = 6, 4, 64


def train(
    recipe: str, primary_weights: bool, made_again: bool = False
) -> tuple[list[float], float, int]:
    """Losses, a sum of the weights, and how many weights are in FP8.

    Args:
        made_again: at the end the weights are lost, and made again from the master weights.
    """
    from tests.te_stand_in import kernels

    kernels.install()
    from dataclasses import replace

    from megatron.core import parallel_state

    from megatron_ladder.config import ParallelConfig
    from megatron_ladder.mcore_compat import initialize_model_parallel
    from pretrain.config.optimizer import OptimizerConfig
    from pretrain.config.presets import PRESETS
    from pretrain.config.schedule import ScheduleConfig
    from pretrain.loop.step import train_step
    from pretrain.model.setup import build
    from pretrain.optim.optimizer import gathered_parameters
    from pretrain.optim.shards import OptimizerShards

    initialize_model_parallel(ParallelConfig(), seed=0)
    config = replace(
        PRESETS["debug"](),
        model=model_of("ladder"),
        optimizer=OptimizerConfig(lr=3e-3),
        schedule=ScheduleConfig(train_steps=STEPS),
        precision="bf16",
        fp8=Fp8Config(recipe, primary_weights=primary_weights),
        transformer_impl="transformer_engine",
        micro_batch_size=1,
        global_batch_size=BATCH,
    )
    torch.manual_seed(0)
    model, optimizer, scheduler = build(config)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, (BATCH, LENGTH + 1), generator=generator)
    rank = parallel_state.get_data_parallel_rank()
    own = tokens[rank :: parallel_state.get_data_parallel_world_size()]

    def batches():  # type: ignore[no-untyped-def]
        while True:
            for piece in own.split(1):
                yield {
                    "tokens": piece[:, :-1],
                    "labels": piece[:, 1:],
                    "loss_mask": torch.ones(1, LENGTH),
                    "position_ids": torch.arange(LENGTH)[None],
                }

    data = batches()
    losses = [train_step(model, optimizer, scheduler, data, config)[0] for _ in range(STEPS)]
    with gathered_parameters(model):
        weights = list(model[0].parameters())
        if made_again:
            for weight in weights:
                (weight._data if kernels.is_fp8(weight) else weight.data).zero_()
            (part,) = optimizer.chained_optimizers
            OptimizerShards([], [], [part]).round_weights()
        in_fp8 = [w for w in weights if kernels.is_fp8(w)]
        total = sum(float(kernels.plain(w).double().abs().sum()) for w in weights)
    return losses, total, len(in_fp8)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_it_trains_as_with_weights_in_bf16(recipe: str, tmp_path: Path) -> None:
    ((beside, _, none),) = run_ranks(1, train, recipe, False, tmp_path=tmp_path)
    ((alone, total, linears),) = run_ranks(1, train, recipe, True, tmp_path=tmp_path)
    assert (none, linears) == (0, 12)
    assert alone == pytest.approx(beside, rel=0.01)
    assert beside[-1] < 0.9 * beside[0]
    two = run_ranks(2, train, recipe, True, tmp_path=tmp_path)
    for losses, total_of_rank, _ in two:
        # delayed scales are found after each micro-batch, of which each rank has half as many.
        assert losses == pytest.approx(alone, rel=0.01)
        assert total_of_rank == two[0][1]  # every rank has gathered the same
        assert total_of_rank == pytest.approx(total, rel=1e-3)


def test_weights_are_made_again_from_the_parts_of_all_ranks(tmp_path: Path) -> None:
    """Within `gathered_parameters`, where gathering overlaps forward: no later forward would gather."""
    as_trained = run_ranks(2, train, "tensorwise", True, tmp_path=tmp_path)
    again = run_ranks(2, train, "tensorwise", True, True, tmp_path=tmp_path)
    assert again == as_trained
