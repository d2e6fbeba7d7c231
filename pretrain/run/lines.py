"""Whether what a run has written about itself has the fields that are read: the run may be a stranger's.

docs/reference/formats.md lists all fields.
"""

from typing import Any

from megatron_ladder.errors import UserError
from megatron_ladder.json_files import is_whole, is_word, short

MOST = (1 << 63) - 1
WHOLE = (
    *("step", "tokens", "train_steps", "world_size", "tokens_per_step", "rank"),
    *("parameters", "trained_parameters"),
)
# Losses may be NaN.
NUMBERS = (
    *("time", "unix_time", "loss", "grad_norm", "learning_rate", "tokens_per_second"),
    *("tflops_per_gpu", "memory_gib", "perplexity", "unigram_loss", "seconds", "median"),
    *("expert_imbalance", "dropped_share", "router_entropy", "z_loss"),
)
BY_LAYER = ("expert_imbalance_by_layer",)  # null for a layer that has none
SHARES = ("mfu", "mfu_whole_sequences")
WORDS = ("dataset", "what", "host", "name", "residual", "device", "state", "folder")
TEXTS = ("reason",)  # what an error said, in many lines where it is of CUDA or of a checkpoint
# By the kind of a line of metrics.jsonl.
NEEDED = {
    "start": ("residual",),
    "baseline": ("dataset", "unigram_loss"),
    "train": ("step", "tokens", "time", "loss"),
    "validation": ("step", "tokens", "time", "dataset", "loss", "perplexity"),
    "bad_step": ("step", "reason", "action", "passed_over"),
    "slow_rank": ("step", "rank", "host", "what", "seconds", "median"),
    "evaluation": ("step",),
    "export": ("step", "folder"),
    "watch_failed": ("step", "what", "reason"),
    "watch_left_out": ("step",),
    "end": ("step", "reason"),
}
STATUS = ("state", "step", "unix_time", "reason")


def left_out(line: dict[str, Any]) -> str:
    """What a line `watch_left_out` says was not done. Older versions left out measurements alone."""
    return "export" if line.get("what") == "export" else "evaluation"


def check_metrics(line: dict[str, Any], where: str) -> None:
    """Refuses a line of metrics.jsonl that has no kind, or lacks a field, or has one of another type.

    Raises:
        UserError: the first that is found. `where` begins the message.
    """
    kind = line.get("kind")
    if not is_word(kind):
        raise UserError(f"{where}: it has no kind")
    for name in NEEDED.get(str(kind), ()):
        if name not in line:
            raise UserError(f"{where}: {name} is missing")
    if wrong := _wrong(line):
        raise UserError(f"{where}: {wrong} is {short(line[wrong])}")
    if kind == "start" and not _are_changes(line.get("changed", {})):
        raise UserError(f"{where}: changed is {short(line['changed'])}")


def _are_changes(value: Any) -> bool:
    """Whether it is a dictionary of names and pairs: the value before, and the value from here on."""
    return isinstance(value, dict) and all(
        is_word(name) and isinstance(pair, list) and len(pair) == 2 for name, pair in value.items()
    )


def is_status(values: dict[str, Any]) -> bool:
    """Whether the fields of status.json that are read are there."""
    return all(name in values for name in STATUS) and _wrong(values) is None


def is_start(line: dict[str, Any]) -> bool:
    """Whether it is a line of starts.jsonl: a start, or the beginning of its training."""
    if "unix_time" not in line or _wrong(line) is not None:
        return False
    before = line.get("before")
    if line.get("kind") == "start":
        return before is None or (isinstance(before, dict) and is_status(before))
    return line.get("kind") == "train" and "step" in line


def _wrong(values: dict[str, Any]) -> str | None:
    """The name of a field that does not have its type."""
    for name in values.keys() & {
        *WHOLE,
        *NUMBERS,
        *WORDS,
        *TEXTS,
        "passed_over",
        *SHARES,
        *BY_LAYER,
    }:
        value = values[name]
        if name in WHOLE:
            right = is_whole(value, 0, MOST)
        elif name in WORDS:
            right = is_word(value)
        elif name in TEXTS:
            right = isinstance(value, str)
        elif name in BY_LAYER:
            right = isinstance(value, list) and all(
                v is None or is_whole(v, -MOST, MOST) or type(v) is float for v in value
            )
        elif name == "passed_over":
            ends = value if isinstance(value, list) and len(value) == 2 else [value]
            right = value is None or (len(ends) == 2 and all(is_whole(i, 0, MOST) for i in ends))
        else:
            right = is_whole(value, -MOST, MOST) or type(value) is float
            right = right or (name in (*SHARES, "loss", "tokens_per_second") and value is None)
        if not right:
            return name
    return None
