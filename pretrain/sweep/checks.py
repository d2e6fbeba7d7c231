"""Checks all runs of a sweep before the first one starts, and says which are done."""

import json
import logging
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ladder.errors import UserError
from pretrain.config.train import TrainConfig, save_config
from pretrain.data.folders import DataFolder
from pretrain.files import write_atomically
from pretrain.run.metrics import flops_per_token
from pretrain.start.launch import local_ranks
from pretrain.start.preflight import preflight
from pretrain.sweep.expand import PlannedRun, planned_runs
from pretrain.sweep.file import read_sweep
from pretrain.sweep.folder import CONFIGS, SWEEP, config_file

State = Literal["new", "begun", "done"]


@dataclass(frozen=True)
class CheckedRun:
    """A run that would start."""

    plan: PlannedRun
    config: TrainConfig
    """With the vocabulary size of the data."""
    state: State

    @property
    def work(self) -> float:
        """Floating-point operations of the training."""
        model = self.config.model
        return self.plan.tokens * flops_per_token(
            num_layers=model.num_layers,
            attention_width=model.attention_width,
            seq_length=self.config.data.seq_length,
            matmul_parameters=model.num_matmul_parameters(),
        )


def checked_runs(
    file: Path, folder: Path, ranks: int | None = None, left_out: Container[str] = ()
) -> list[CheckedRun]:
    """The runs of a sweep's file, checked as `train` would check them, those of least work first.

    Args:
        folder: the sweep's.
        ranks: of each run; None: as many as `train` would start here.
        left_out: names of runs that are not to start, such as those that a job trains now.

    Raises:
        UserError: the first mistake that is found, and in which run.
    """
    runs = read_plan(file, folder)
    before = logging.root.manager.disable
    try:
        checked = []
        for run in runs:
            if run.name in left_out:
                continue
            try:
                checked.append(_checked(run, ranks))
            except UserError as error:
                raise UserError(f"{file}: run {run.name}: {error}") from None
            logging.disable(logging.WARNING)  # the other runs have the same warnings
    finally:
        logging.disable(before)
    return sorted(checked, key=lambda run: run.work)


def _checked(run: PlannedRun, ranks: int | None) -> CheckedRun:
    config = run.config
    config, folders, plan = preflight(config, ranks or local_ranks(config, None))
    if without := next((f for f in folders if not _validates(f, config)), None):
        raise UserError(
            f"{without.path} has no sequence to validate on: tokenize it with a larger "
            "--validation-fraction. Runs are compared by their validation loss"
        )
    state: State = "new" if plan.startswith("New") else "begun" if plan else "done"
    return CheckedRun(run, config, state)


def _validates(folder: DataFolder, config: TrainConfig) -> bool:
    return folder.tokens("validation") > config.data.seq_length


def read_plan(file: Path, folder: Path) -> list[PlannedRun]:
    """The runs of a sweep's file. Raises UserError, which names the file."""
    sweep = read_sweep(file)
    try:
        return planned_runs(sweep, folder)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def write_plan(file: Path, folder: Path) -> None:
    """Writes each run's configuration, and the list of runs, which the report reads."""
    runs = read_plan(file, folder)
    (folder / CONFIGS).mkdir(parents=True, exist_ok=True)
    for run in runs:
        save_config(run.config, config_file(folder, run.name))
    listed = [
        {
            "name": run.name,
            "size": run.size,
            "values": run.values,
            "held_out": run.held_out,
            "parameters": run.parameters,
            "tokens": run.tokens,
        }
        for run in runs
    ]
    text = json.dumps({"file": file.read_text(), "runs": listed}, indent=1)
    write_atomically(folder / SWEEP, text + "\n")
