"""`megatron-ladder train`."""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

from pretrain.commands.users import failed, for_users, of_the_system
from pretrain.config.train import TrainConfig
from pretrain.loop.watchdog import Watchdog
from pretrain.model.queues import set_queues
from pretrain.ranks import Rank, check_gpus, launched_rank
from pretrain.run.ends import Crash
from pretrain.start.arguments import parse_train
from pretrain.start.first_rank import by_first_rank, first_words
from pretrain.start.open_files import raise_limit


@dataclass(frozen=True)
class _Checked:
    """What one process has read and checked, for all ranks."""

    config: TrainConfig
    folders: list[Any]
    plan: str
    """"": the run is finished."""
    ranks: int


@for_users
def train(argv: list[str]) -> int:
    """Trains a run, or resumes it. Starts the local ranks that it needs, unless torchrun has done so."""
    if any(option.split("=")[0] == "--plan-only" for option in argv):
        from pretrain.start.plan_only import plan_only

        return plan_only(argv)
    raise_limit()
    with Watchdog() as watchdog:  # from the first second, as a file system may hang already
        return _train(argv, watchdog)


def _train(argv: list[str], watchdog: Watchdog) -> int:
    rank, store = launched_rank(), None
    if rank:
        watchdog.phase("meeting the other ranks")
        from pretrain.model.setup import meet

        try:
            store = meet()
        except OSError as error:
            raise Crash(of_the_system(error)) from error
    watchdog.phase("checking the configuration, the data sets and the run's folder")
    checked = by_first_rank(store, rank, "checks", partial(_checked, argv, rank, watchdog))
    watchdog.know(checked.config)
    try:
        return _run(argv, checked, rank, store, watchdog)
    except Exception as error:
        # From here on the folder is this run's: a failure is this run's failure.
        return failed("train", error, run_dir=checked.config.output_dir)


def _run(
    argv: list[str], checked: _Checked, rank: Rank | None, store: Any, watchdog: Watchdog
) -> int:
    config, ranks, plan = checked.config, checked.ranks, checked.plan
    set_queues(config)  # before any search for a GPU: that may start CUDA
    log = logging.getLogger(__name__)
    if not plan and not (plan := _damage_of_the_last(config, rank, store)):
        log.info(
            "%s: already trained to step %d, nothing to do", config.output_dir, config.train_steps
        )
        return 0
    if rank is None and ranks > 1:
        from pretrain.start.launch import launch

        assert config.output_dir is not None
        watchdog.stop()  # each rank has its own
        return launch(argv, ranks, config.output_dir)
    log.info(plan)
    watchdog.phase("importing the libraries")
    from pretrain.loop.stopping import StopSignals
    from pretrain.loop.train import train as run_training

    with StopSignals() as signals:
        try:
            return run_training(config, checked.folders, signals, watchdog, store)
        except ConnectionError:  # the connection to another rank, which has ended
            raise
        except OSError as error:  # a failure of the disk: a new start may work
            raise Crash(of_the_system(error)) from error
        except SystemExit as ended:  # checkpoints cannot be written: the first rank says why
            if isinstance(ended.code, str):
                raise Crash(ended.code) from None
            raise


def _checked(argv: list[str], rank: Rank | None, watchdog: Watchdog) -> _Checked:
    config, asked = parse_train(argv)
    watchdog.know(config)
    set_queues(config)  # before any search for a GPU: that may start CUDA
    from pretrain.start.launch import local_ranks
    from pretrain.start.preflight import preflight

    ranks = rank.world_size if rank else local_ranks(config, asked)
    if rank is None and asked is not None:
        check_gpus(asked, "--nproc-per-node")
    config, folders, plan = preflight(config, ranks)
    if config.watch.is_on:  # its imports take long
        from pretrain.evaluation.beside import check_watch

        check_watch(config, folders)
    return _Checked(config, folders, plan, ranks)


def _damage_of_the_last(config: TrainConfig, rank: Rank | None, store: Any) -> str:
    """What the last checkpoint of a finished run lacks, for the log; "" when it is whole.

    All ranks read it, each a part.
    """
    from pretrain.run.checkpoint_files import damage
    from pretrain.run.folder import latest_checkpoint

    assert config.output_dir is not None
    last = latest_checkpoint(config.output_dir)
    assert last is not None
    if rank is None:
        what = damage(last, read=True)
    else:
        mine = damage(last, read=True, part=rank.number, parts=rank.world_size)
        what = first_words(store, rank, "damage", mine)
    return what and f"{last} is damaged: {what}"
