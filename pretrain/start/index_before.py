"""`megatron-ladder index`: makes a run's index files before the run, without its ranks."""

import logging
import time

from megatron_ladder.errors import UserError
from pretrain.config.places import with_absolute_paths
from pretrain.config.train import TrainConfig
from pretrain.data.checks import open_data, with_vocab_size
from pretrain.data.fim import fill_in_the_middle
from pretrain.index.cache import is_made, make_index
from pretrain.processes import shield_forked_children
from pretrain.run.folder import check_output_dir, lock
from pretrain.start.going_on.changes import with_past
from pretrain.start.open_files import raise_limit

logger = logging.getLogger(__name__)

SAY_EVERY_S = 10.0


def index_before(config: TrainConfig, rank: int | None = None, world_size: int = 1) -> str:
    """Makes the index files that the run with this configuration will look for; returns a summary.

    Those that are there are not made again.

    Args:
        rank, world_size: of a job array's task: it makes its share. What needs all shares is left to a
            call without them.

    Raises:
        UserError: the configuration does not fit its data or the run's folder, or a training is at work.
        OSError: a file could not be made; those that were made stay.
    """
    raise_limit()  # a blend may have a thousand data sets
    # The same checks as before a training, as far as they are about data and the run's folder.
    folders = open_data(config)
    config = with_vocab_size(config)
    fill_in_the_middle(config, folders[0])
    if rank is None:  # tasks of an array do not look at the lock: another may hold it for a moment
        check_output_dir(config)
    if config.output_dir is None:
        raise UserError("no --output-dir: give the folder of the run that will train")
    config, folders = with_past(config, folders)
    config = with_absolute_paths(config)
    assert config.output_dir is not None
    path = config.output_dir / "dataset_cache"
    if is_made(path, config, folders):
        return f"{path}: already made for this configuration, nothing to do"
    shield_forked_children()  # Ctrl-C is for this process; the others end with it
    held = lock(config.output_dir) if rank is None else None
    began = said = time.monotonic()
    for progress in make_index(config, folders, path, rank, world_size):
        if time.monotonic() - said >= SAY_EVERY_S:
            said = time.monotonic()
            logger.info("%s", progress.words)
    if held:
        held.close()
    took = f"in {time.monotonic() - began:.0f} s"
    if rank is not None:
        return f"The share of task {rank} of {world_size} is made {took}. All done? The same without --rank"
    return f"Index files: {path}, made {took}"
