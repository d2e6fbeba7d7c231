"""A branch: a run that goes on from a checkpoint of another run, in a folder of its own.

It begins as if it had saved that checkpoint itself: the files are in its folder too, by hard links. So
nothing is copied, and several branches of one trunk share its bytes on the disk. Nobody needs to keep the
trunk's checkpoint: when the trunk deletes it, or is deleted, the branch still has the files, until it
deletes them by its own --keep-last. Only where a file system has no such links are they copied.

    RUN/trunk.json                   the trunk's folder, the checkpoint's step and its configuration
    RUN/checkpoints/step_00000300    the trunk's checkpoint
    RUN/data, RUN/imported, RUN/initial.json    as in the trunk's folder
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from megatron_ladder.errors import UserError
from megatron_ladder.json_files import read_json
from megatron_ladder.reading.plain_files import refuse_links
from pretrain.config.past import Past
from pretrain.config.places import found_from, run_and_step
from pretrain.config.train import TrainConfig, load_config, to_dict
from pretrain.config.values import from_dict
from pretrain.files import link_or_copy, sync, write_atomically
from pretrain.run.checkpoint_files import damage, refuse_newer
from pretrain.run.folder import (
    INITIAL,
    MERGED,
    TRUNK,
    checkpoint_at,
    checkpoint_step,
    checkpoints,
    latest_checkpoint,
)


def trunk_checkpoint(branch_from: Path) -> Path:
    """The checkpoint that RUN@STEP names.

    Raises:
        UserError: there is none, or it has no optimizer's state.
    """
    run, step = run_and_step(branch_from)
    found = checkpoint_at(run, step)
    if found not in (there := checkpoints(run)):
        steps = ", ".join(str(checkpoint_step(path)) for path in there)
        raise UserError(
            f"--branch-from {branch_from}: {run} has no checkpoint of step {step}; "
            + (f"it has {steps}. A run keeps --keep-last of them" if there else "it has none")
        )
    if (run / MERGED).is_file() or step == 0:  # step 0: an imported model
        raise UserError(
            f"--branch-from {branch_from}: {run} has weights alone, and no optimizer's state: begin a run "
            f"with them, by --init-from {run}"
        )
    refuse_newer(found)
    return found


def options_of_trunk(branch_from: Path, output_dir: Path | None) -> TrainConfig:
    """What the options of a branch are unless they are given: the trunk's at that checkpoint.

    Args:
        output_dir: of the branch. If it has begun, the trunk is not needed any more.
    """
    _, step = run_and_step(branch_from)
    note = output_dir and output_dir / TRUNK
    kept = read_json(note, "what a run branched off") if note and note.is_file() else {}
    if kept.get("step") == step:
        config: TrainConfig = from_dict(TrainConfig, kept.get("config"), str(note))
    else:
        checkpoint = trunk_checkpoint(branch_from)
        config = found_from(checkpoint.parents[1], load_config(checkpoint / "config.json"))
    return replace(config, output_dir=None, branch_from=branch_from, past=Past())


def is_to_begin(config: TrainConfig) -> bool:
    """Whether the run is a branch that has no checkpoint in its folder yet."""
    assert config.output_dir is not None
    return config.branch_from is not None and latest_checkpoint(config.output_dir) is None


def begin_branch(config: TrainConfig) -> None:
    """Links the trunk's checkpoint into the branch's folder, if there is none. By the first rank alone,
    which holds the folder's lock.

    Raises:
        UserError: the trunk's checkpoint has gone, or files of it are missing.
    """
    if not is_to_begin(config):
        return
    assert config.output_dir is not None and config.branch_from is not None
    source = trunk_checkpoint(config.branch_from)
    trunk = source.parents[1]
    saved = load_config(source / "config.json")
    _copy_facts(trunk, config.output_dir, data_sets=len(saved.data.paths))
    target = checkpoint_at(config.output_dir, checkpoint_step(source))
    new = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        refuse_links(source, home=source)
        for file in source.iterdir():
            link_or_copy(file, new / file.name)
        what = damage(new, read=False)
    except FileNotFoundError as error:
        what = f"{error.filename} is missing"
    if what:
        shutil.rmtree(new)
        raise UserError(
            f"--branch-from {config.branch_from}: {what}: the checkpoint is damaged, or its run has just "
            "deleted it. Choose another step"
        )
    facts = {
        "run": str(trunk.absolute()),
        "step": checkpoint_step(source),
        "config": to_dict(found_from(trunk, saved)),
    }
    write_atomically(config.output_dir / TRUNK, json.dumps(facts, indent=1) + "\n")
    sync(new)
    new.rename(target)
    sync(target.parent)


def _copy_facts(trunk: Path, output_dir: Path, data_sets: int) -> None:
    """Copies what the trunk's folder keeps of its data sets, and of the model that it began with.

    Args:
        data_sets: how many there were at the checkpoint. Others may have joined since.
    """
    names = [*(f"data/{number}" for number in range(data_sets)), "imported", INITIAL]
    for name in names:
        source, target = trunk / name, output_dir / name
        if target.exists() or not source.exists():
            continue
        refuse_links(source, home=trunk)
        new = output_dir / f".{target.name}.tmp"
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.rmtree(new, ignore_errors=True)
            shutil.copytree(source, new)
        else:
            shutil.copyfile(source, new)
        new.rename(target)
