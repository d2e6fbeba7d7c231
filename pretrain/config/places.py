"""The folders that a run's configuration names, also when they or the run have been moved."""

import os
from dataclasses import replace
from pathlib import Path

from megatron_ladder.errors import UserError
from pretrain.config.train import TrainConfig


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The configuration as a run saves it: its folders are the same from wherever it is read."""
    return replace(
        config,
        data=replace(config.data, paths=tuple(path.absolute() for path in config.data.paths)),
        watch=replace(
            config.watch,
            data=tuple(path.absolute() for path in config.watch.data),
            include_path=config.watch.include_path and config.watch.include_path.absolute(),
        ),
        init_from=config.init_from and config.init_from.absolute(),
        branch_from=config.branch_from and config.branch_from.absolute(),
        output_dir=config.output_dir and config.output_dir.absolute(),
    )


def with_names(config: TrainConfig) -> TrainConfig:
    """`config` with folders whose last part is a name: metrics and plots show it.

    `.` and `a/..` have none.
    """

    def named(path: Path) -> Path:
        return path.resolve() if path.name in ("", "..") else path

    return replace(
        config,
        data=replace(config.data, paths=tuple(map(named, config.data.paths))),
        output_dir=config.output_dir and named(config.output_dir),
    )


def run_and_step(branch_from: Path) -> tuple[Path, int]:
    """The run and the step of RUN@STEP.

    Raises:
        UserError: it is nothing of that form.
    """
    run, _, step = str(branch_from).rpartition("@")
    if not run or not (step.isascii() and step.isdigit() and len(step) < 9):
        raise UserError(
            f"--branch-from {branch_from}: give a run's folder and a step, as runs/trunk@300"
        )
    return Path(run), int(step)


def branch_at(run: Path, step: int) -> Path:
    """RUN@STEP."""
    return run.with_name(f"{run.name}@{step}")


def run_of(file: Path) -> Path | None:
    """The run whose configuration, or whose checkpoint's, this file is; None for any other file."""
    folder = file.absolute().parent
    if folder.parent.name == "checkpoints":
        folder = folder.parents[1]
    is_run = (folder / "lock").is_file() or (folder / "checkpoints").is_dir()
    return folder if is_run and file.name == "config.json" else None


def found_from(run: Path, config: TrainConfig) -> TrainConfig:
    """A run's saved configuration, with its folders where they are now.

    The run is in `run`, whatever was saved. Where another folder is not in its saved place, it is looked
    for in the same place relative to the run: both may have been moved together. Paths saved by older
    versions are relative to the folder in which training was started, which is not known.
    """
    saved_run = config.output_dir

    def found(path: Path) -> Path:
        if saved_run is None or path.is_absolute() != saved_run.is_absolute():
            return path
        if path.is_absolute() and path.exists():
            return path
        moved = Path(os.path.normpath(run.absolute() / os.path.relpath(path, saved_run)))
        return moved if moved.exists() else path

    def found_trunk(branch_from: Path) -> Path:
        trunk, step = run_and_step(branch_from)
        return branch_at(found(trunk), step)

    return replace(
        config,
        data=replace(config.data, paths=tuple(map(found, config.data.paths))),
        watch=replace(
            config.watch,
            data=tuple(map(found, config.watch.data)),
            include_path=config.watch.include_path and found(config.watch.include_path),
        ),
        init_from=config.init_from and found(config.init_from),
        branch_from=config.branch_from and found_trunk(config.branch_from),
        output_dir=run,
    )
