"""`megatron-ladder train`."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_ladder.errors import UserError
from pretrain.commands.users import failed, for_users, of_the_system
from pretrain.config.train import TrainConfig
from pretrain.model.queues import set_queues
from pretrain.ranks import RankError, check_gpus, is_first_rank, launched_rank
from pretrain.run.ends import Crash
from pretrain.start.arguments import parse_train


@for_users
def train(argv: list[str]) -> int:
    """Trains a run, or resumes it. Starts the local ranks that it needs, unless torchrun has done so."""
    if any(option.split("=")[0] == "--plan-only" for option in argv):
        from pretrain.start.plan_only import plan_only

        return plan_only(argv)
    config, asked = _on_this_rank(parse_train, argv)
    set_queues(config)  # before any search for a GPU: that may start CUDA
    if asked is not None and asked < 1:
        raise UserError(f"--nproc-per-node {asked}: start at least one rank")
    try:
        return _train(argv, config, asked)
    except Exception as error:
        return failed("train", error, run_dir=config.output_dir)


Found = TypeVar("Found")


def _on_this_rank(check: Callable[..., Found], *given: Any) -> Found:
    """What a check that every rank makes of the same options gives.

    Raises:
        UserError, OSError: a mistake of the user's.
        Crash: another rank than the first one finds it. If it is a mistake of the user's, the first one
            finds it too, and its 2 decides. Else it is this machine's: a disk that is not mounted, say.
    """
    try:
        return check(*given)
    except RankError:
        raise
    except (UserError, OSError) as error:
        if is_first_rank():
            raise
        said = str(error) if isinstance(error, UserError) else of_the_system(error)
        raise Crash(said) from error


def _train(argv: list[str], config: TrainConfig, asked: int | None) -> int:
    launched = launched_rank()
    from pretrain.start.launch import launch, local_ranks

    ranks = launched.world_size if launched else local_ranks(config, asked)
    if launched is None and asked is not None:
        check_gpus(asked, "--nproc-per-node")
    from pretrain.start.preflight import preflight

    config, folders, plan = _on_this_rank(preflight, config, ranks)
    log = logging.getLogger(__name__)
    if not plan:
        log.info(
            "%s: already trained to step %d, nothing to do", config.output_dir, config.train_steps
        )
        return 0
    if launched is None and ranks > 1:
        assert config.output_dir is not None
        return launch(argv, ranks, config.output_dir)
    log.info(plan)
    from pretrain.loop.stopping import StopSignals
    from pretrain.loop.train import train as run_training

    with StopSignals() as signals:
        try:
            return run_training(config, folders, signals)
        except ConnectionError:  # the connection to another rank, which has ended
            raise
        except OSError as error:  # a failure of the disk: a new start may work
            raise Crash(of_the_system(error)) from error
        except SystemExit as ended:  # checkpoints cannot be written: the first rank says why
            if isinstance(ended.code, str):
                raise Crash(ended.code) from None
            raise
