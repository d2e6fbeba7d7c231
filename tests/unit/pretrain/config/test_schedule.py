"""A ramp of the batch size: against megatron-core's own calculator, and against sums by hand."""

from dataclasses import replace

import pytest
from megatron.core import num_microbatches_calculator

from megatron_ladder.config import ParallelConfig
from megatron_ladder.errors import UserError
from pretrain.config.past import Past, PastBatchSize
from pretrain.config.presets import PRESETS
from pretrain.config.schedule import BatchSizes, ScheduleConfig, batch_sizes
from pretrain.config.train import TrainConfig
from pretrain.optim.optimizer import learning_rate


def with_ramp(ramp: tuple[int, int, int], size: int = 8, **fields) -> TrainConfig:
    config = PRESETS["debug"]()
    schedule = replace(config.schedule, rampup_batch_size=ramp)
    return replace(config, schedule=schedule, global_batch_size=size, **fields)


@pytest.mark.parametrize(
    ("ramp", "last"), [((2, 2, 12), 6), ((32, 32, 1000), 256), ((8, 24, 7), 80), ((1, 1, 99), 100)]
)
def test_sizes_are_those_of_megatron(ramp: tuple[int, int, int], last: int) -> None:
    calculator = getattr(
        num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator", None
    )
    if calculator is None:
        pytest.skip("0.19 has no ramp")
    theirs = calculator(last, 1, 1, False, 1, *ramp)
    ours, consumed = batch_sizes((), ramp, last), 0
    for step in range(1, 200):
        theirs.update(consumed, consistency_check=False)
        assert ours.of(step) == theirs.get_current_global_batch_size(), step
        assert ours.samples_after(step - 1) == consumed
        assert ours.steps_for(consumed) == step - 1
        assert ours.steps_for(consumed + 1) == step
        consumed += ours.of(step)
    assert ours.of(200) == last


def test_what_the_steps_so_far_had_stays() -> None:
    """A run of 4 sequences a step gets a ramp after 5 steps, which have 20 of its 24 sequences."""
    five = (PastBatchSize(5, 4),)
    sizes = batch_sizes(five, (2, 2, 24), 8)
    # Three increments of 8 sequences: 20 to 26 is the third one.
    assert [sizes.of(step) for step in range(1, 8)] == [4] * 5 + [6, 8]
    assert sizes.up_to(3) == (PastBatchSize(3, 4),)
    assert sizes.up_to(6) == (*five, PastBatchSize(6, 6))
    assert sizes.up_to(9) == (*five, PastBatchSize(6, 6), PastBatchSize(9, 8))
    assert sizes.up_to(0) == ()
    assert sizes.counts(9) == {4: 5, 6: 1, 8: 3}
    assert batch_sizes(five, (2, 2, 20), 8) == BatchSizes(five, 8)  # it is over
    past = Past(batch_sizes=five)
    assert with_ramp((2, 2, 24), past=past).tokens_after(7) == 64 * (20 + 6 + 8)


def test_lengths_in_tokens_are_those_of_the_ramp() -> None:
    config = with_ramp((2, 2, 12), 6)
    schedule = replace(
        config.schedule,
        train_steps=None,
        train_tokens=20 * 64,
        warmup_steps=None,
        warmup_tokens=640,
    )
    config = replace(config, schedule=schedule)
    assert (config.train_steps, config.warmup_steps) == (6, 4)  # 2 2 2 4 4 6


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        ((0, 2, 12), "give three numbers of at least 1"),
        ((8, 2, 12), "begins with 8 sequences, and global_batch_size is 8. Begin with fewer"),
        ((2, 4, 12), "steps of 4 do not lead from 2 to global_batch_size 8. .* divides 6"),
    ],
)
def test_ramps_that_lead_nowhere_are_refused(ramp: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=f"rampup_batch_size is .*{message}"):
        with_ramp(ramp)


def test_each_batch_of_a_ramp_is_divided_over_the_ranks() -> None:
    config = with_ramp((2, 2, 12), micro_batch_size=2)
    config.check_batches(1)
    with pytest.raises(UserError, match="a batch of 2, which schedule"):
        config.check_batches(2)
    stages = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    with pytest.raises(UserError, match=r"1 micro-batches a step \(a batch of 2, which schedule"):
        with_ramp((2, 2, 12), micro_batch_size=2, parallel=stages).check_batches(1)
    assert [config.num_microbatches(1, step) for step in (1, 4, 9)] == [1, 3, 4]


@pytest.mark.parametrize(
    ("share", "decay_steps"), [(0.0, 0), (0.001, 1), (0.2, 20), (0.6, 60), (0.7, 60), (1.0, 60)]
)
def test_the_rate_goes_down_from_the_end_of_warm_up_at_the_earliest(
    share: float, decay_steps: int
) -> None:
    """Of 100 steps, 40 warm up. Before, a larger share made the rate jump down after warm-up."""
    config = PRESETS["debug"]()
    schedule = ScheduleConfig(
        train_steps=100, warmup_steps=40, decay="wsd", wsd_decay_fraction=share, min_lr_fraction=0.0
    )
    config = replace(config, schedule=schedule)
    assert config.wsd_decay_steps == decay_steps
    rates = [learning_rate(config, step) / config.optimizer.lr for step in range(40, 101)]
    down = [min(1.0, (100 - step) / decay_steps) if share else 1.0 for step in range(40, 101)]
    assert rates == pytest.approx(down)
