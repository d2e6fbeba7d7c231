"""Which fields of the configuration may change when a run is resumed or branched, and why others may not.

docs/guides/change-a-run.md has the table for users, and tests/unit/pretrain/start/test_changes.py reads it.
"""

from typing import Any

from megatron_ladder.errors import UserError

Changes = dict[str, tuple[Any, Any]]
"""By a field's dotted name: the value of the steps so far, and that of the steps to come."""

# None of them changes what a step computes (a layout changes numbers by rounding only). Steps that were
# skipped or rolled back stay so, whatever `faults` says now.
_ANY_TIME = (
    "faults.",
    "parallel.",
    "profile.",
    "watch.",
    "output_dir",
    "data.num_workers",
    "micro_batch_size",
    "transformer_impl",
    "attention",
    "recompute",
    "compile",
    "cuda_graph",
    "eval_interval",
    "eval_sequences",
    "save_interval",
    "keep_last",
    "async_save",
    "log_interval",
    "tensorboard",
    "wandb",
)
# They hold for the steps to come; start/going_on/changes.py refuses what would contradict the steps so far.
_FROM_HERE_ON = (
    "data.paths",
    "data.weights",
    "data.phases",
    "schedule.train_steps",
    "schedule.train_tokens",
    "schedule.decay",
    "schedule.wsd_decay_fraction",
    "schedule.wsd_decay_steps",
    "schedule.min_lr_fraction",
    "optimizer.lr",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "optimizer.z_loss_coeff",
    "optimizer.ema_decay",
    "schedule.rampup_batch_size",
    "global_batch_size",
)
_WHY_NOT = {
    "model.": "the weights are of that model",
    "data.seq_length": "the place in the data is counted in sequences of that length",
    "data.": "sequences are made by it, and those of one run are made alike",
    "schedule.warmup": "warm-up is the run's beginning",
    "optimizer.optimizer": "its moments are the other optimizer's",
    "optimizer.muon_momentum": "Muon's momentum was made with it",
    "optimizer.": "Adam's moments were made with it",
    "precision": "all numbers of a run have one precision",
    "fp8.": "all numbers of a run have one precision",
    "seed": "the order of the data comes from it",
    "deterministic": "a run repeats bit by bit as a whole or not at all",
    "init_from": "the run began with it",
    "branch_from": "the run began with it",
    "adapt.": "the run began with it",
    "side.": "the run began with it",
}
# How a run is kept, not what it is: no change of these is told.
_KEEPING = ("output_dir", "branch_from", "past.")


def may_change(name: str) -> bool:
    """Whether a field, by its dotted name, may change when a run is resumed or branched."""
    return name.startswith((*_ANY_TIME, *_FROM_HERE_ON))


def why_not(name: str) -> str:
    """The reason why a field may not change, for messages. It is one that may not."""
    return next(why for prefix, why in _WHY_NOT.items() if name.startswith(prefix))


def told(name: str) -> bool:
    """Whether a change of a field belongs into the run's history."""
    return not name.startswith(_KEEPING)


def refuse_other_runs(changed: Changes, what: str) -> None:
    """Refuses changes that would make another run.

    Args:
        what: the beginning of the message, such as "RUN holds".

    Raises:
        UserError: it names each, with the reason.
    """
    refused = [name for name in changed if not may_change(name)]
    if refused:
        detail = "; ".join(
            f"{name}: {changed[name][0]} -> {changed[name][1]} ({why_not(name)})"
            for name in refused
        )
        raise UserError(
            f"{what} another run: {detail}.\nChoose another --output-dir, or give these their old values. "
            "docs/guides/change-a-run.md lists what may change"
        )


def refuse_other_desync(changed: Changes, desync_interval: int, what: str) -> None:
    """Refuses another tensor-parallel size of a desync model.

    Args:
        what: the run or the checkpoint, for the message.

    Raises:
        UserError: it would be another one.
    """
    if tp := changed.get("parallel.tensor_model_parallel_size"):
        raise UserError(
            f"{what} was trained with desync-{desync_interval} at parallel.tensor_model_parallel_size "
            f"{tp[0]}: its ranks' residual states differ between two sums, so at {tp[1]} the same weights "
            f"would be a different model. Keep {tp[0]}"
        )
