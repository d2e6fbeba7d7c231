"""Checks before a training whether its checkpoints can be measured and exported beside it."""

from collections.abc import Sequence

from megatron_ladder.errors import UserError
from pretrain.config.train import TrainConfig
from pretrain.config.watch import OFFLINE
from pretrain.convert.plain_model import one_rank_model
from pretrain.data.folders import DataFolder, open_folder
from pretrain.data.sample import check_tokenizer
from pretrain.evaluation.documents import open_split
from pretrain.evaluation.harness import find_tasks
from pretrain.evaluation.options import EvalOptions
from pretrain.evaluation.refine import check_scorer, items_of
from pretrain.watch.commands import measured_on


def check_watch(config: TrainConfig, folders: Sequence[DataFolder]) -> None:
    """Makes the checks that `eval` and `export` would make of the run's first checkpoint, without it.

    Args:
        config: the run's configuration, which `preflight` has checked; something is done beside it.
        folders: its data sets.

    Raises:
        UserError: a task does not exist or has no data, or the model can neither be measured nor exported.
    """
    watch, run_dir = config.watch, config.output_dir
    assert run_dir is not None
    one_rank_model(config.model, config.parallel.tensor_model_parallel_size, run_dir)
    if not watch.tasks:
        return
    data = measured_on(config, folders)
    if set(OFFLINE).intersection(watch.tasks) and not data:
        raise UserError(
            "--watch.tasks: none of the run's data sets has a validation split to measure on: give another "
            "data set with --watch.data, or tokenize with --validation-fraction"
        )
    try:
        options = EvalOptions(run_dir, (tuple(data),), (watch.tasks,))
    except UserError as error:
        raise UserError(f"--watch.tasks: {error}") from error
    if "refine" in watch.tasks:
        check_scorer()
    own = folders[0]
    for path in options.data_paths():
        documents = open_split(open_folder(path), options.split)
        if {"perplexity", "needle", "refine"}.intersection(watch.tasks):  # the data's own ids
            check_tokenizer(documents.folder, own.path / own.tokenizer["file"], run_dir)
        if "refine" in watch.tasks:
            items_of(documents, 1, options.seed)
    if names := options.harness_tasks():
        find_tasks(names, watch.include_path)
