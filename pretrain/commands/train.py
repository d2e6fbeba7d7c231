"""`megatron-ladder train`."""

import logging
import sys

from megatron_ladder.errors import UserError
from pretrain.commands.users import for_users
from pretrain.loop.watchdog import Watchdog
from pretrain.model.queues import set_queues
from pretrain.ranks import check_gpus, launched_rank
from pretrain.start.arguments import parse_train


@for_users
def train(argv: list[str]) -> int:
    """Trains a run, or resumes it. Starts the local ranks that it needs, unless torchrun has done so."""
    if any(option.split("=")[0] == "--plan-only" for option in argv):
        from pretrain.start.plan_only import plan_only

        return plan_only(argv)
    with Watchdog() as watchdog:  # from the first second, as a file system may hang already
        return _train(argv, watchdog)


def _train(argv: list[str], watchdog: Watchdog) -> int:
    config, asked = parse_train(argv)
    watchdog.know(config)
    set_queues(config)  # before any search for a GPU: that may start CUDA
    if asked is not None and asked < 1:
        raise UserError(f"--nproc-per-node {asked}: start at least one rank")
    launched = launched_rank()
    from pretrain.start.launch import launch, local_ranks

    ranks = launched.world_size if launched else local_ranks(config, asked)
    if launched is None and asked is not None:
        check_gpus(asked, "--nproc-per-node")
    from pretrain.start.preflight import preflight

    watchdog.phase("checking the configuration, the data sets and the run's folder")
    config, folders, plan = preflight(config, ranks)
    watchdog.know(config)
    log = logging.getLogger(__name__)
    if not plan:
        log.info(
            "%s: already trained to step %d, nothing to do", config.output_dir, config.train_steps
        )
        return 0
    if launched is None and ranks > 1:
        assert config.output_dir is not None
        watchdog.stop()  # each rank has its own
        return launch(argv, ranks, config.output_dir)
    log.info(plan)
    watchdog.phase("importing the libraries")
    from pretrain.loop.stopping import StopSignals
    from pretrain.loop.train import train as run_training

    with StopSignals() as signals:
        try:
            return run_training(config, folders, signals, watchdog)
        except ConnectionError:  # the connection to another rank, which has ended
            raise
        except (
            OSError
        ) as error:  # a failure of the disk, not the user's mistake: a new start may work
            what = f"{error.filename or 'the operating system'}: {error.strerror or error}"
            print(f"megatron-ladder train: {what}", file=sys.stderr)
            return 1
