"""A run that goes on from a checkpoint with other options: they hold for the steps to come.

Each checkpoint has the configuration of its last step. So what the steps before it had is known wherever
training goes on: in the run, after a checkpoint was damaged, or in a branch (branch.py).
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ladder.errors import UserError
from pretrain.config.changes import Changes, refuse_other_desync, refuse_other_runs, told
from pretrain.config.past import Past, PastBlend
from pretrain.config.places import with_absolute_paths
from pretrain.config.train import TrainConfig, differences, load_config
from pretrain.data.blends import Blend, blends, check_phases, in_force
from pretrain.data.folders import DataFolder
from pretrain.run.ends import Crash
from pretrain.run.folder import checkpoint_step, latest_checkpoint
from pretrain.start.going_on.branch import is_to_begin, trunk_checkpoint
from pretrain.start.going_on.past import same_data


def with_past(
    config: TrainConfig, folders: list[DataFolder]
) -> tuple[TrainConfig, list[DataFolder]]:
    """The configuration with what the steps so far had, and the data sets with their first names.

    Args:
        config: that `check_output_dir` has accepted.

    Raises:
        UserError: a value may not change, or the data sets are others.
    """
    assert config.output_dir is not None
    trunk = None
    if is_to_begin(config):
        assert config.branch_from is not None
        trunk = trunk_checkpoint(config.branch_from)
    folders = same_data(config.output_dir, folders, trunk)
    checkpoint = trunk or latest_checkpoint(config.output_dir)
    config, _ = going_on_from(checkpoint, config, folders)
    check_phases(config)
    return config, folders


def going_on_from(
    checkpoint: Path | None, config: TrainConfig, folders: list[DataFolder]
) -> tuple[TrainConfig, Changes]:
    """The configuration of the steps after a checkpoint.

    Args:
        checkpoint: of this run, or of the run that it branches off; None: the run begins.
        config: as it was asked for. What it says of the steps so far (`past`) is not read.

    Returns:
        `config` with the values that the steps so far had, and what has changed.

    Raises:
        UserError: a value may not change, or not at this step.
    """
    asked = replace(config, past=Past())
    old = config_of(checkpoint) if checkpoint else None
    if checkpoint is None or old is None:
        return asked, {}
    step = checkpoint_step(checkpoint)
    changed = differences(with_absolute_paths(old), with_absolute_paths(asked))
    changed = {name: pair for name, pair in changed.items() if told(name)}
    if "init_from" in changed and None not in changed["init_from"]:
        changed.pop("init_from")  # `check_output_dir` compares what is in the folders
    refuse_other_runs(changed, f"{checkpoint} is of")
    if asked.model.residual == "desync":
        refuse_other_desync(changed, asked.model.desync_interval, str(checkpoint))
    new = replace(asked, past=old.past)
    if {"global_batch_size", "schedule.rampup_batch_size"} & {*changed}:
        sizes = old.batch_sizes.up_to(step)
        new = replace(new, past=replace(new.past, batch_sizes=sizes))
    if new.train_steps < step:
        raise UserError(
            f"the run is to have {new.train_steps:,} steps in all, and {step:,} are trained: give "
            f"--schedule.train-steps {step} to end it here, or more"
        )
    if new.samples_after(new.train_steps) != old.samples_after(old.train_steps):
        new = replace(new, past=replace(new.past, drawn=old.drawn_samples))
    new = _with_past_blends(new, old, step, folders)
    _check_rate(new, old, step)
    return new, changed


def config_of(checkpoint: Path) -> TrainConfig | None:
    """The configuration of a checkpoint's last step; None: it cannot be read. Then the checkpoint is
    damaged, which is said elsewhere, or of a version that saved it with the run alone."""
    for file in (checkpoint / "config.json", checkpoint.parents[1] / "config.json"):
        try:
            return load_config(file)
        except (UserError, OSError):
            continue
    return None


def _check_rate(new: TrainConfig, old: TrainConfig, step: int) -> None:
    """Refuses another schedule if the learning rate would jump, but for another peak."""
    # Imported where needed: it imports megatron-core.
    from pretrain.optim.optimizer import learning_rate

    with_old_peak = replace(new, optimizer=replace(new.optimizer, lr=old.optimizer.lr))
    was, now = learning_rate(old, step), learning_rate(with_old_peak, step)
    if was == now:
        return
    if step <= max(old.warmup_steps, new.warmup_steps):
        raise UserError(
            f"warm-up is not over at step {step:,}, and would take {new.warmup_steps:,} steps in place of "
            f"{old.warmup_steps:,}: change global_batch_size after it, or give schedule.warmup_steps"
        )
    begin = (
        f"the learning rate of step {step:,} was {was:.4g}, and by the new schedule it is {now:.4g}"
    )
    if old.schedule.decay == "cosine":
        raise UserError(
            f"{begin}: it would jump, as a cosine goes down from the end of warm-up on and depends on its "
            "whole length. A run that has begun as a cosine keeps its length: begin another run with its "
            "weights, --init-from RUN --output-dir NEW. Where the length is open, begin with "
            "--schedule.decay wsd"
        )
    if new.schedule.decay == "cosine":
        raise UserError(
            f"{begin}: it would jump, as a cosine goes down from the end of warm-up on: leave "
            "--schedule.decay cosine out"
        )
    if old.train_steps - old.wsd_decay_steps < step:
        raise UserError(
            f"{begin}: it is going down since step {old.train_steps - old.wsd_decay_steps:,}. Branch off a "
            "checkpoint before that: --branch-from RUN@STEP"
        )
    raise UserError(
        f"{begin}: it would begin to go down at step {new.train_steps - new.wsd_decay_steps:,}, which is "
        f"trained. Give --schedule.wsd-decay-steps {new.train_steps - step}, or fewer"
    )


def _with_past_blends(
    new: TrainConfig, old: TrainConfig, step: int, folders: list[DataFolder]
) -> TrainConfig:
    """`new`, in which the steps so far have the blends that they were trained with.

    Nothing is added where its own blends say the same of these steps.
    """
    known = len(old.data.paths)
    joined = (0.0,) * (len(folders) - known)
    trained = [
        Blend(blend.first_step, (*blend.weights, *joined))
        for blend in blends(old, folders[:known])
        if blend.first_step <= step
    ]
    planned = blends(new, folders)
    says = [blend for blend in planned if blend.first_step <= step]
    if [(b.first_step, b.shares) for b in trained] == [(b.first_step, b.shares) for b in says]:
        return new
    if in_force(planned, step + 1).shares == in_force(trained, step).shares:
        raise UserError(
            f"the run has been trained to step {step} ({old.tokens_after(step):,} tokens) with the weights "
            f"{'; '.join(map(_words, trained))}, but data.weights and data.phases now say "
            f"{'; '.join(map(_words, says))}, which is the same for the steps to come: undo the change. To "
            "change the blend later, add a phase to data.phases"
        )
    kept = tuple(PastBlend(blend.first_step, blend.weights) for blend in trained)
    return replace(new, past=replace(new.past, blends=kept, blends_to=step))


def _words(blend: Blend) -> str:
    return f"{' '.join(f'{w:.17g}' for w in blend.weights)} from step {blend.first_step} on"


def changes_at_start(
    checkpoint: Path | None, config: TrainConfig, folders: list[DataFolder]
) -> Changes:
    """What changes at the checkpoint that is loaded. Called by all ranks.

    Raises:
        Crash: `config` was made for another checkpoint, which has turned out to be damaged, and the steps
            so far had other values than it says. The next start begins with the checkpoint that is left.
    """
    from torch.distributed import broadcast_object_list, get_rank

    found: list[Any] = [None]
    if get_rank() == 0:
        with suppress(UserError):  # the next start says it
            now, changed = going_on_from(checkpoint, config, folders)
            found = [changed if now.past == config.past else None]
    broadcast_object_list(found)
    if found[0] is None:
        raise Crash(
            "the newest checkpoint is damaged, and options have changed since the one before it: start "
            "again, to go on from that one"
        )
    return found[0]
