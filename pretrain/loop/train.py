"""The training loop."""

import time
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ladder.errors import UserError
from megatron_ladder.specs import resolve_impl
from pretrain.config.train import TrainConfig
from pretrain.data.baselines import Baselines
from pretrain.data.folders import DataFolder
from pretrain.data.reading import RankBatches
from pretrain.index.cache import IndexCache
from pretrain.loop.bad_steps import BadSteps
from pretrain.loop.log import RunLog
from pretrain.loop.profile import StepProfile
from pretrain.loop.rank_speed import RankSpeed
from pretrain.loop.saving import CheckpointSaver
from pretrain.loop.side import load_backbone, start_side
from pretrain.loop.starting import Starting
from pretrain.loop.step import pass_over, train_step, validate
from pretrain.loop.stopping import StopSignals
from pretrain.loop.teacher import Teacher
from pretrain.loop.watchdog import Watchdog
from pretrain.model.gradual import use_ladder_layers
from pretrain.model.graphs import StepGraph
from pretrain.model.routers import load_balance
from pretrain.model.setup import build, layers_config, smallest_card, start_ranks, stop_ranks
from pretrain.optim.optimizer import gathered_parameters
from pretrain.plan.attended import attended
from pretrain.plan.fits import check_memory, out_of_memory
from pretrain.plan.memory import is_planned, kept_as
from pretrain.ranks import is_first_rank, world_size
from pretrain.run import random_states
from pretrain.run.bad_step import BadStep
from pretrain.run.checkpoint import (
    Progress,
    load_checkpoint,
    load_initial_weights,
    model_chunks,
    newest_valid,
)
from pretrain.run.ends import leave
from pretrain.run.folder import checkpoint_at, write_config
from pretrain.run.lock import lock
from pretrain.run.status import Status
from pretrain.start.first_rank import by_first_of_groups
from pretrain.start.going_on.branch import begin_branch
from pretrain.start.going_on.changes import changes_at_start
from pretrain.start.initial import initial_checkpoint
from pretrain.start.launch import STOPPED
from pretrain.watch.watch import Watch

WATCH_S = 0.5
"""At a run's end, the time between two looks whether its last checkpoint is measured."""


def train(
    config: TrainConfig,
    folders: list[DataFolder],
    signals: StopSignals,
    watchdog: Watchdog,
    store: Any = None,
) -> int:
    """Trains to the end of the schedule, from the newest checkpoint of the run if there is one.

    Called by every rank, under torchrun if there are several. preflight.py has checked `config` and
    `folders`.

    Args:
        store: where the ranks have met; None: they have not, or there is one rank.

    Returns:
        The exit status: 0, or STOPPED after a signal.

    Raises:
        UserError: the run does not fit in memory, by the plan or in a step, or stops at a bad step.
    """
    run_dir = config.output_dir
    assert run_dir is not None
    watchdog.phase("taking the run's folder")
    if is_first_rank():
        held = lock(run_dir)
        write_config(config)  # first of all files: it marks the folder as this run's
        begin_branch(config)
    # Found before training: when memory is full, the GPU can answer no more questions.
    kept: list[Any] = []  # the core attention, and the tokens of the longest document
    with Status(config) as status:
        try:
            exit_status = _train(config, folders, signals, status, watchdog, kept, store)
        except torch.OutOfMemoryError as error:
            # A new start would not help: this is as a user's mistake.
            raise UserError(out_of_memory(config, world_size(), error, *kept)) from error
    if is_first_rank():
        held.close()
    return exit_status


def _train(
    config: TrainConfig,
    folders: list[DataFolder],
    signals: StopSignals,
    status: Status,
    watchdog: Watchdog,
    kept: list[Any],
    store: Any = None,
) -> int:
    run_dir = config.output_dir
    assert run_dir is not None
    starting = Starting(watchdog, status)
    cache = IndexCache(config, folders)  # made in the background while the model is built
    baselines = Baselines(config, folders)
    starting.phase("joining the other ranks")
    device = start_ranks(config, store)
    if is_planned(config) and resolve_impl(config.transformer_impl) == "transformer_engine":
        core = layers_config(config).core_attention
        longest = None
        if core.keeps_scores:  # the other ranks may open no file of a data set
            longest = by_first_of_groups(lambda: attended(config, folders).longest)
        kept += [kept_as(core), longest]
        check_memory(config, torch.distributed.get_world_size(), smallest_card(), *kept)

    starting.phase("building the model")
    model, optimizer, scheduler = build(config)
    if config.side.is_on:
        starting.phase("reading the backbone")
        load_backbone(config, model)
    teacher = Teacher(config) if config.adapt.distillation_weight else None
    progress = Progress(step=0, consumed_samples=0)
    starting.phase("checking the newest checkpoint")
    checkpoint = newest_valid(run_dir)
    if checkpoint is None and config.branch_from:
        raise UserError(
            f"no checkpoint is left in {run_dir}, and the one that the branch begins with is damaged: "
            f"start again when {config.branch_from} is whole, or branch off another step"
        )
    changed = changes_at_start(checkpoint, config, folders)
    if checkpoint:
        starting.phase(f"reading the checkpoint {checkpoint.name}")
        progress = load_checkpoint(checkpoint, model, optimizer, scheduler)
        assert progress.consumed_samples == config.samples_after(progress.step)
    elif config.init_from and not config.side.is_on:
        starting.phase("reading the initial weights")
        load_initial_weights(initial_checkpoint(config.init_from), model_chunks(model))
        optimizer.reload_model_params()
        if optimizer.ema:
            optimizer.ema.begin()
    starting.phase("making the data sets' index files")
    for how_far in cache.wait():
        starting.progress(how_far)
    starting.phase("opening the data sets")
    data = RankBatches(config, folders, cache.path)
    if config.side.is_on and not checkpoint:
        starting.phase("finding the side network's first weights")
        start_side(config, model, optimizer, data)
    speed = RankSpeed(config, reads=data.reads)
    batches = data.received(speed.timed(data.training(progress.consumed_samples)))
    log = RunLog(config, progress.step, device, status, watchdog, changed)
    watch = Watch(config, folders, log.beside())
    saver = CheckpointSaver(config, log, watch)
    profile = StepProfile(config)
    bad_steps = BadSteps(config, saver, progress.recent_losses)
    graph = StepGraph(model) if config.cuda_graph else None
    log.built(model[0].config, *kept)
    log.data(folders, baselines)

    def validates(step: int) -> bool:
        if step == 0:  # the loss of the changed model before it is trained
            return config.init_from is not None
        return step == config.train_steps or bool(
            config.eval_interval and step % config.eval_interval == 0
        )

    def evaluate(step: int, done: Collection[str] = ()) -> None:
        log.doing("validating")
        use_ladder_layers(model, config, None)  # all ladder layers are on, as in an export
        for name, held_out in data.validation(done):
            with gathered_parameters(model):
                loss = validate(model, held_out, config, saver.complete, data.received)
            log.validation(step, name, loss)

    def answer(bad: BadStep, drawn: dict[str, Tensor]) -> None:
        """Stops the run at a bad step, or passes over the step, or goes back to a checkpoint.

        Args:
            drawn: the random states before the step.
        """
        if bad.action == "stop":
            raise UserError(
                f"{bad.reason} at step {bad.step}. The last checkpoint is untouched: start again with a "
                "lower optimizer.lr or in fp32, or let the run pass over such steps (faults.not_finite, "
                "faults.spike)"
            )
        log.passed_over(bad.step, bad)
        if bad.action == "skip":  # a resumed run passes over the step, and draws nothing for it
            random_states.restore(drawn)
        if bad.action == "rollback":
            assert bad.passed_over
            checkpoint = checkpoint_at(run_dir, bad.passed_over[0] - 1)
            log.allow_more()
            with gathered_parameters(model):
                back = load_checkpoint(checkpoint, model, optimizer, scheduler)
            scheduler.step(increment=bad.step - back.step)
            bad_steps.went_back(back.recent_losses)

    signal = ""

    def is_good(step: int, *figures: Any) -> bool:
        """Whether a step is good; the ranks also agree on stop signals here.

        Called between backward and the update, where the host has already waited for the GPU. At any other
        place, an exchange between the ranks would wait for all work that is queued on the GPU.
        """
        nonlocal signal
        signal = signals.agreed()
        return bad_steps.is_good(step, *figures)

    def save(*, wait: bool) -> None:
        with gathered_parameters(model):
            saver.save(progress, model, optimizer, scheduler, wait=wait)

    with saver, watch:
        if validates(progress.step):
            # A step is saved before it is validated, so a run may have ended between the two.
            evaluate(progress.step, done=log.validated(progress.step))
        for step in range(progress.step + 1, config.train_steps + 1):
            if not log.has_reader():
                signals.stop("the program that read the output has ended")
            use_ladder_layers(model, config, step)
            if before := bad_steps.decided(step):
                pass_over(scheduler, batches, config, step)
                signal = signals.agreed()
                log.passed_over(step, before)
            else:
                drawn = random_states.states() if config.faults.may_skip else {}
                with profile.of(step):
                    figures = train_step(
                        *(model, optimizer, scheduler, batches, config),
                        teacher.add_logits if teacher else None,
                        partial(is_good, step),
                        graph,
                        step,
                    )
                if bad_steps.found:
                    answer(bad_steps.found, drawn)
                else:
                    due = log.is_due(step)
                    balance = load_balance(model, config.model.num_layers) if due else {}
                    log.train(step, *figures, data.attended(), balance)
            log.slow_ranks(step, speed.slow_ranks(step))
            progress = Progress(step, config.samples_after(step), bad_steps.recent_losses)
            last = step == config.train_steps

            saver.complete()
            log.watched(watch)
            if last or signal or step % config.save_interval == 0:
                save(wait=last or bool(signal))
            if signal and not last:
                break  # the next start validates, where a validation is due
            if validates(step):
                evaluate(step)  # after saving: it may be killed for taking long
                # Validation takes long, and after it the GPU has no queued work to wait for.
                signal = signals.agreed()
                if signal and not last:
                    save(wait=True)
                    break

        profile.close()
        finished = progress.step == config.train_steps
        while finished and by_first_of_groups(watch.is_busy):
            log.doing("measuring")
            watch.waited_for()
            log.watched(watch)
            signal = signal or signals.agreed()
            finished = not signal  # the next start does what is left
            time.sleep(WATCH_S)
        log.watched(watch)
        log.end(progress.step, "finished" if finished else f"signal {signal}")
        if finished:
            saver.wait_for_deletion()

    signals.ignore()
    if is_first_rank() and not finished:
        leave(STOPPED, "")  # srun kills ranks that take long to end, and would return their 137
    stop_ranks()
    return 0 if finished else STOPPED
