"""All checks of a run that are made before it starts."""

import logging
from itertools import combinations

from megatron_ladder.config import check_layout
from megatron_ladder.errors import UserError
from megatron_ladder.fp8 import check_machine
from megatron_ladder.layers.attention.choice import check_attention
from megatron_ladder.specs import resolve_impl
from pretrain.config.optimizer import check_optimizer
from pretrain.config.places import with_absolute_paths
from pretrain.config.side import check_side_layout, trained_parameters
from pretrain.config.train import TrainConfig
from pretrain.data.blends import describe
from pretrain.data.checks import open_data, with_vocab_size
from pretrain.data.fim import fill_in_the_middle
from pretrain.data.folders import DataFolder
from pretrain.model.compiled import check_compile
from pretrain.model.graphs import check_cuda_graph
from pretrain.run.folder import check_free_space, check_output_dir, plan_of
from pretrain.start.extend import extension
from pretrain.start.going_on.changes import with_past
from pretrain.start.going_on.past import is_same
from pretrain.start.initial import check_initial
from pretrain.start.open_files import check_open_files

logger = logging.getLogger(__name__)


def preflight(config: TrainConfig, world_size: int) -> tuple[TrainConfig, list[DataFolder], str]:
    """Checks a run's configuration against its data, its folder and the number of its ranks.

    Returns:
        The configuration, with the vocabulary size filled in from the data and with absolute paths; the
        data folders; and a text that says what will happen to the output folder (empty: its run is
        finished).

    Raises:
        UserError: the first mistake that is found.
    """
    if config.model.residual == "no-comm":
        raise UserError(
            "model.residual no-comm leaves out every tensor-parallel all-reduce, so its results are "
            "wrong: it is for measurements of speed only (benchmarks/overlap.py). Give another kind"
        )
    folders = open_data(config)
    check_open_files(folders, world_size)
    given, config = config.model.vocab_size, with_vocab_size(config, folders)
    if given is not None and given > folders[0].tokenizer["vocab_size"]:
        logger.warning(
            "model.vocab_size is %d, but the data's tokenizer has only %d ids: the model is never "
            "trained on the other ids",
            given,
            folders[0].tokenizer["vocab_size"],
        )
    for one, other in combinations(folders, 2):
        if is_same(one, other):
            logger.warning(
                "%s and %s hold the same training text: each sequence is trained on twice as often as data."
                "weights say. Give it once, with the sum of the weights",
                *(one.path, other.path),
            )
    check_initial(config, folders)
    check_layout(config.model, config.parallel)
    check_side_layout(config.side, config.model, config.parallel)
    check_machine(config.fp8, resolve_impl(config.transformer_impl))
    check_attention(
        config.attention,
        resolve_impl(config.transformer_impl),
        documents_divided=config.documents_divided,
    )
    check_optimizer(config.optimizer, config.precision)
    check_compile(config)
    check_cuda_graph(config)
    config.check_batches(config.parallel.data_parallel_size(world_size))
    fill_in_the_middle(config, folders[0])
    if config.keep_last < 2:
        raise UserError(
            f"keep_last is {config.keep_last}: give at least 2, so that another checkpoint is left when "
            "the newest one is damaged"
        )
    check_output_dir(config)
    config, folders = with_past(config, folders)
    plan = plan_of(config)
    if plan and (config.data.phases or config.past.blends):
        plan = f"{plan}\n{describe(config, folders)}"
    if plan and config.side.is_on:
        plan = (
            f"{plan}\nA side network of {trained_parameters(config):,} parameters is trained. The "
            f"backbone, {config.model.num_parameters():,} parameters, is not"
        )
    if plan and (longer := extension(config)):
        plan = f"{plan}\n{longer}"
    if plan:  # a finished run writes nothing
        check_free_space(config)
    if config.wandb:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise UserError(
                "--wandb: the wandb package is not installed: run `pip install wandb`"
            ) from None
    return with_absolute_paths(config), folders, plan
