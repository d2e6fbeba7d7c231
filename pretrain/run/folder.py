"""A run's folder: finds its checkpoints, and checks whether a run may start or resume in it."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ladder.errors import UserError
from megatron_ladder.json_files import is_word, read_json
from megatron_ladder.reading.plain_files import refuse_links
from pretrain.config.changes import Changes, refuse_other_desync, refuse_other_runs, told
from pretrain.config.past import Past
from pretrain.config.places import with_absolute_paths
from pretrain.config.side import trained_parameters
from pretrain.config.train import (
    TrainConfig,
    differences,
    load_config,
    save_config,
)
from pretrain.files import link_or_copy, sync
from pretrain.run.checkpoint_files import damage, refuse_damaged, refuse_newer, written_files
from pretrain.run.lock import lock
from pretrain.run.metrics import has_finished
from pretrain.sizes import in_units

# In a run's folder; docs/reference/formats.md.
BACKBONE = "backbone"
INITIAL = "initial.json"
TRUNK = "trunk.json"
MERGED = "merged.json"
EVALUATIONS = "evaluations"
EXPORTS = "exports"


def checkpoints(run_dir: Path) -> list[Path]:
    """A run's complete checkpoints, oldest first."""
    return sorted(p for p in (run_dir / "checkpoints").glob("step_*") if p.name[5:].isdigit())


def latest_checkpoint(run_dir: Path) -> Path | None:
    found = checkpoints(run_dir)
    return found[-1] if found else None


def checkpoint_at(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def find_checkpoint(run: Path) -> Path:
    """A run's newest checkpoint, or the given one. Checks the sizes of its files.

    Args:
        run: the folder of a run or of a checkpoint.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    if not run.is_dir():
        raise UserError(f"run {run} does not exist")
    found = latest_checkpoint(run)
    for path in (run, run.resolve()):  # a link, or a name within the folder of checkpoints
        if path.parent.name == "checkpoints" and path in checkpoints(path.parents[1]):
            found = path
            break
    if found is None:
        raise UserError(f"{run} has no checkpoint: is it a run of `megatron-ladder train`?")
    refuse_newer(found)
    refuse_damaged(found, read=False)  # checksums are compared when the weights are read
    return found


def check_output_dir(config: TrainConfig) -> None:
    """Checks that this run may write to its folder. Called by one process for all ranks.

    Raises:
        UserError: no folder is given, it cannot be written to, it holds something else or another run, or
            another process trains in it.
    """
    run_dir = config.output_dir
    if run_dir is None:
        raise UserError("no --output-dir: give the folder for the run's checkpoints and metrics")
    saved = run_dir / "config.json"
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--output-dir {run_dir} is a file: give a folder")
    # A run first creates its lock, then its config.json.
    if _is_used(run_dir) and not saved.is_file():
        raise UserError(
            f"--output-dir {run_dir} is not empty and holds no run: choose another folder"
        )
    _check_writable(run_dir)
    if (run_dir / MERGED).is_file():
        raise UserError(
            f"{run_dir} holds a mean of checkpoints, which has no optimizer's state to go on with: begin a "
            f"run with its weights, by --init-from {run_dir} and another --output-dir"
        )
    if not saved.is_file():
        return
    changed = _changed(load_config(saved), config)
    refuse_other_runs(changed, f"{run_dir} holds")
    if config.model.residual == "desync":
        refuse_other_desync(changed, config.model.desync_interval, str(run_dir))
    lock(run_dir).close()  # raises UserError while another process trains here
    if latest := latest_checkpoint(run_dir):
        refuse_newer(latest)


def plan_of(config: TrainConfig) -> str:
    """What will happen, for the log: a new run, or a resumed one and what has changed.

    "" when the run in the folder is finished. Its last checkpoint has the sizes that were written; it is
    not read.

    Args:
        config: that `check_output_dir` has accepted, with what the steps so far had.
    """
    run_dir = config.output_dir
    assert run_dir is not None
    saved = run_dir / "config.json"
    latest = latest_checkpoint(run_dir)
    if config.branch_from and not latest:
        return f"New branch in {run_dir}, of {config.branch_from}"
    if not saved.is_file():
        return f"New run in {run_dir}"
    is_trained = latest is not None and checkpoint_step(latest) >= config.train_steps
    # Without its last validation the run goes on, if only for that.
    has_ended = is_trained and has_finished(run_dir, config.train_steps)
    if latest and has_ended and not damage(latest, read=False):
        return ""
    where = f"step {checkpoint_step(latest)}" if latest else "the start: it has no checkpoint yet"
    changed = {n: pair for n, pair in _changed(load_config(saved), config).items() if told(n)}
    what = ", ".join(f"{n}: {a} -> {b}" for n, (a, b) in changed.items())
    return f"Resuming {run_dir} from {where}" + (f" (changed: {what})" if what else "")


def _changed(old: TrainConfig, config: TrainConfig) -> Changes:
    """How a run's configuration differs from the saved one, apart from names of the same folders."""
    old, config = (replace(with_absolute_paths(c), past=Past()) for c in (old, config))
    changed = differences(old, config)
    assert config.output_dir is not None
    if old.init_from and config.init_from and _same_start(config, old.init_from):
        changed.pop("init_from", None)
    if old.branch_from and config.branch_from:
        has_begun = latest_checkpoint(config.output_dir) is not None
        if not has_begun or _same_trunk(old.branch_from, config.branch_from):
            changed.pop("branch_from", None)
    return changed


def started_from(run_dir: Path) -> dict[str, Any] | None:
    """The checkpoint whose weights the run started from, by its name and its files; None: not noted."""
    note = run_dir / INITIAL
    if not note.is_file():
        return None
    found = read_json(note, "what a run started from")
    if not isinstance(found.get("files"), dict) or not is_word(found.get("checkpoint")):
        raise UserError(
            f"{note} is not what a run started from: it names no checkpoint and its files"
        )
    return found


def _same_start(config: TrainConfig, old: Path) -> bool:
    """Whether a run is to begin with the same folder as before, or with the same weights."""
    assert config.output_dir is not None and config.init_from is not None
    if old.resolve() == config.init_from.resolve():
        return True
    kept = started_from(config.output_dir)
    return kept is not None and kept["files"] == written_files(find_checkpoint(config.init_from))


def _same_trunk(old: Path, now: Path) -> bool:
    """Whether a branch is to begin at the same step of a run of the same name: the run may have moved."""
    return old.name == now.name or old.resolve() == now.resolve()


def _is_used(run_dir: Path) -> bool:
    """Whether the folder has more than a run's first files.

    Submitting a run, its index files and its first rank create some files, and so does the watchdog of a
    start that hung before. Other ranks may see these already.
    """
    beginning = ("lock", "config.json", "slurm", "dataset_cache", ".dataset_cache", "hangs")
    return run_dir.is_dir() and any(not p.name.startswith(beginning) for p in run_dir.iterdir())


def checkpoint_bytes(config: TrainConfig) -> int:
    """The size of one checkpoint: weights, fp32 master weights, AdamW's two moments or Muon's one, the
    average."""
    a_parameter = 16 if config.precision == "fp32" else 14
    if config.optimizer.ema_decay is not None:
        a_parameter += 4
    size = trained_parameters(config) * a_parameter
    if config.optimizer.optimizer == "muon":
        size -= 4 * config.model.num_parameters(embeddings=False)
    return size


def stored_bytes(config: TrainConfig) -> int:
    """The most bytes that checkpoints take in a run's folder: those kept, and the one being written."""
    return checkpoint_bytes(config) * (config.keep_last + 1)


def check_free_space(config: TrainConfig) -> None:
    """Checks that the disk has room for the checkpoints to keep and the one being written. What lies in
    the run's folder already needs no more room.

    Raises:
        UserError: it has not.
    """
    assert config.output_dir is not None
    needed, there = stored_bytes(config), _bytes_there(config.output_dir)
    free = shutil.disk_usage(_existing_parent(config.output_dir)).free
    if free + there < needed:
        raise UserError(
            f"{config.output_dir}: {in_units(free, 'B')} free, keep_last {config.keep_last} checkpoints "
            f"and the one being written take about {in_units(needed, 'B')}"
            + (f", of which {in_units(there, 'B')} are there" if there else "")
            + ": free space, lower keep_last, or choose another disk"
        )


def _bytes_there(run_dir: Path) -> int:
    """The bytes of a run's checkpoints that are kept, or deleted when newer ones come: not of damaged
    ones, and not of files that another folder has, too, by hard links."""
    left = (run_dir / "checkpoints").glob("step_*.tmp")
    files = [file.stat() for folder in (*checkpoints(run_dir), *left) for file in folder.iterdir()]
    return sum(file.st_size for file in files if file.st_nlink == 1)


def write_config(config: TrainConfig) -> None:
    """Saves the resolved configuration in the run's folder."""
    assert config.output_dir is not None
    config.output_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, config.output_dir / "config.json")


def _check_writable(run_dir: Path) -> None:
    parent = _existing_parent(run_dir)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--output-dir {run_dir}: no permission to write in {parent}")


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def keep_backbone(run_dir: Path, checkpoint: Path) -> None:
    """Keeps a checkpoint as the backbone of a side-tuned run: the one that the run began with.

    Checkpoints of such a run hold the side network alone, since the backbone does not change. RUN/backbone
    is a folder like a run's, with that checkpoint in it. Its files are hard links where the file system
    allows: they take no room, and stay when the other run deletes its own. Elsewhere they are copied, once.
    So the run is whole by itself, and the checkpoint's manifest has the checksums that show damage.
    """
    refuse_links(checkpoint, home=checkpoint.parents[1])
    folder = backbone_of(run_dir) / "checkpoints"
    new = folder / f"{checkpoint.name}.tmp"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for file in sorted(checkpoint.iterdir()):
        link_or_copy(file, new / file.name)
    sync(new)
    new.rename(folder / checkpoint.name)
    sync(folder)


def backbone_of(run_dir: Path) -> Path:
    """The folder of a side-tuned run's backbone, for `find_checkpoint`."""
    return run_dir / BACKBONE
