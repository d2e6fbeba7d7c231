"""What a start of `train` refuses beyond TrainConfig's own checks.

Those hold for every file that is read: one that an older version has accepted, or one that options are put
on top of. These are of the whole configuration of a run that begins.
"""

from megatron_ladder.errors import UserError
from pretrain.config.train import TrainConfig


def check_usable(config: TrainConfig) -> None:
    """Refuses numbers that end in a failure of a library, or fill the memory; and options without effect.

    Raises:
        UserError: the first that is found.
    """
    at_most = {
        "micro_batch_size": (config.micro_batch_size, 1 << 20),
        "global_batch_size": (config.global_batch_size, 1 << 30),
        "data.num_workers": (config.data.num_workers, 1024),
        "schedule.train_steps": (config.schedule.train_steps, 10**9),
        "optimizer.lr": (config.optimizer.lr, 1e6),
        "optimizer.weight_decay": (config.optimizer.weight_decay, 1e6),
        "seed": (config.seed, 4 * 10**9),  # others are made of it, which numpy takes up to 2**32
        "faults.hang_s": (config.faults.hang_s, 1e7),  # torch takes a multiple of it as a timeout
        "faults.start_s": (config.faults.start_s, 1e7),
    }
    for name, (value, most) in at_most.items():
        if value is not None and value > most:
            raise UserError(f"{name} is {value:,}: it must be at most {most:,.0f}")
    profile, watch = config.profile, config.watch
    if profile.first_step is None and profile.steps != type(profile).steps:
        raise UserError(
            f"profile.steps is {profile.steps}, but profile.first_step is not set: set it, or leave the "
            "other out"
        )
    if profile.first_step is not None and profile.first_step > config.train_steps:
        raise UserError(
            f"profile.first_step {profile.first_step} is after the run's {config.train_steps} steps: "
            "choose an earlier one"
        )
    if not watch.tasks and watch.max_tokens != type(watch).max_tokens:
        raise UserError(
            "watch.max_tokens is for the tasks of watch.tasks: name some, such as --watch.tasks "
            "perplexity, or leave it out"
        )
