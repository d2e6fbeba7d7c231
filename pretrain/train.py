"""The training loop."""

from megatron.core import parallel_state

from pretrain.arguments import is_first_rank
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
from pretrain.run_folder import find_checkpoint, latest_checkpoint, lock, write_config
from pretrain.run_log import RunLog
from pretrain.sequences import train_sequences, validation_sequences
from pretrain.setup import build, start_ranks, stop_ranks
from pretrain.status import Status
from pretrain.step import train_step, validate
from pretrain.teacher import Teacher


def train(config: TrainConfig, folders: list[DataFolder]) -> None:
    """Trains to the end of the schedule, from the newest checkpoint of the run if there is one.

    Called by every rank, under torchrun. `config` and `folders` have been checked by preflight.py.
    """
    run_dir = config.output_dir
    assert run_dir is not None
    if is_first_rank():
        held = lock(run_dir)
        write_config(config)  # before anything else is there: the folder is this run's
    with Status(config) as status:
        _train(config, folders, status)
    if is_first_rank():
        held.close()


def _train(config: TrainConfig, folders: list[DataFolder], status: Status) -> None:
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
    batches = train_batches(
        train_sequences(config, folders, cache.path),
        config,
        consumed_samples=progress.consumed_samples,
        **data_parallel,
    )
    log = RunLog(config, progress.step, device, status)
    if progress.step == 0:
        log.data(folders)

    def evaluate(step: int) -> None:
        log.doing("validating")
        use_ladder_layers(model, config, None)  # the model that is to be, as an export is
        for name, dataset in validations.items():
            held_out = validation_batches(dataset, config, **data_parallel)
            with gathered_parameters(model):
                log.validation(step, name, validate(model, held_out, config))

    if progress.step == 0 and config.init_from:
        evaluate(0)  # what changing the model costs before it is trained
    for step in range(progress.step + 1, config.train_steps + 1):
        use_ladder_layers(model, config, step)
        loss, grad_norm, learning_rate = train_step(
            model, optimizer, scheduler, batches, config, teacher
        )
        log.train(step, loss, grad_norm, learning_rate)
        progress = Progress(step, step * config.global_batch_size)
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
