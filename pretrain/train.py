"""The training loop."""

from functools import partial

from megatron.core import parallel_state

from megatron_ladder.errors import UserError
from pretrain.arguments import is_first_rank
from pretrain.bad_steps import BadStep, BadSteps
from pretrain.checkpoint import (
    Progress,
    load_checkpoint,
    load_initial_weights,
    model_chunks,
    save_checkpoint,
)
from pretrain.config import TrainConfig
from pretrain.data import DataFolder, train_batches, validation_batches
from pretrain.gradual import use_ladder_layers
from pretrain.index_cache import IndexCache
from pretrain.optimizer import gathered_parameters
from pretrain.rank_speed import RankSpeed
from pretrain.run_folder import (
    checkpoint_step,
    find_checkpoint,
    latest_checkpoint,
    lock,
    write_config,
)
from pretrain.run_log import RunLog
from pretrain.sequences import train_sequences, validation_sequences
from pretrain.setup import build, start_ranks, stop_ranks
from pretrain.status import Status
from pretrain.step import pass_over, train_step, validate
from pretrain.teacher import Teacher
from pretrain.watchdog import Watchdog


def train(config: TrainConfig, folders: list[DataFolder]) -> None:
    """Trains to the end of the schedule, from the newest checkpoint of the run if there is one.

    Called by every rank, under torchrun. `config` and `folders` have been checked by preflight.py.
    """
    run_dir = config.output_dir
    assert run_dir is not None
    if is_first_rank():
        held = lock(run_dir)
        write_config(config)  # before anything else is there: the folder is this run's
    with Status(config) as status, Watchdog(config) as watchdog:
        _train(config, folders, status, watchdog)
    if is_first_rank():
        held.close()


def _train(
    config: TrainConfig, folders: list[DataFolder], status: Status, watchdog: Watchdog
) -> None:
    run_dir = config.output_dir
    assert run_dir is not None
    cache = IndexCache(config, folders)  # made meanwhile
    device = start_ranks(config)

    model, optimizer, scheduler = build(config)
    teacher = Teacher(config) if config.adapt.distillation_weight else None
    progress = Progress(step=0, consumed_samples=0)
    if checkpoint := latest_checkpoint(run_dir):
        progress = load_checkpoint(checkpoint, model, optimizer, scheduler)
    elif config.init_from:
        load_initial_weights(find_checkpoint(config.init_from), model_chunks(model))
        optimizer.reload_model_params()
    data_parallel = {
        "data_parallel_rank": parallel_state.get_data_parallel_rank(),
        "data_parallel_size": parallel_state.get_data_parallel_world_size(),
    }
    validations = validation_sequences(config, folders, cache.ready())
    speed = RankSpeed(config)
    batches = speed.timed(
        train_batches(
            train_sequences(config, folders, cache.path),
            config,
            consumed_samples=progress.consumed_samples,
            **data_parallel,
        )
    )
    bad_steps = BadSteps(config, progress.recent_losses)
    log = RunLog(config, progress.step, device, status, watchdog)
    if progress.step == 0:
        log.data(folders)

    def evaluate(step: int) -> None:
        log.doing("validating")
        use_ladder_layers(model, config, None)  # the model that is to be, as an export is
        for name, dataset in validations.items():
            held_out = validation_batches(dataset, config, **data_parallel)
            with gathered_parameters(model):
                log.validation(step, name, validate(model, held_out, config))

    def answer(bad: BadStep) -> None:
        if bad.action == "stop":
            raise UserError(
                f"{bad.reason} at step {bad.step}: lower optimizer.lr, train in fp32, or pass such steps "
                "over (faults.not_finite, faults.spike); the last checkpoint is untouched"
            )
        log.passed_over(bad.step, bad)
        if bad.action == "rollback":
            checkpoint = latest_checkpoint(run_dir)
            assert checkpoint and bad.passed_over
            assert checkpoint_step(checkpoint) == bad.passed_over[0] - 1
            with gathered_parameters(model):
                back = load_checkpoint(checkpoint, model, optimizer, scheduler)
            scheduler.step(increment=bad.step - back.step)
            bad_steps.went_back(back.recent_losses)

    if progress.step == 0 and config.init_from:
        evaluate(0)  # what changing the model costs before it is trained
    for step in range(progress.step + 1, config.train_steps + 1):
        use_ladder_layers(model, config, step)
        if before := bad_steps.decided(step):
            pass_over(scheduler, batches, config)
            log.passed_over(step, before)
        else:
            figures = train_step(
                *(model, optimizer, scheduler, batches, config, teacher),
                partial(bad_steps.is_good, step),
            )
            if bad_steps.found:
                answer(bad_steps.found)
            else:
                log.train(step, *figures)
        log.slow_ranks(step, speed.slow_ranks(step))
        progress = Progress(step, step * config.global_batch_size, bad_steps.recent_losses)
        last = step == config.train_steps

        if last or (config.eval_interval and step % config.eval_interval == 0):
            evaluate(step)
        if last or step % config.save_interval == 0:
            log.doing("saving")
            with gathered_parameters(model):
                save_checkpoint(run_dir, progress, config, model, optimizer, scheduler)
            log.saved(step)

    log.end(progress.step)
    stop_ranks()
