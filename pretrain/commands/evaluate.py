"""`megatron-ladder eval`."""

import tyro

from pretrain.commands.users import for_users


@for_users
def eval_(argv: list[str]) -> int:
    """Measures a model on data sets and tasks."""
    from pretrain.evaluation.options import EvalOptions

    options = tyro.cli(EvalOptions, args=argv, prog="megatron-ladder eval")
    from pretrain.evaluation.command import evaluate

    evaluate(options)
    return 0
