"""The runs of a sweep: the product of its axes for each size, each with a name and a configuration."""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.json_files import short
from pretrain.config.places import with_absolute_paths
from pretrain.config.train import TrainConfig
from pretrain.config.values import from_dict, to_dict
from pretrain.sweep.file import PER_PARAMETER, SIZE, TOKENS, Fields, Sweep

MOST_RUNS = 10_000


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    name: str
    """Of its folder, made of the size's name and the axes' values."""
    size: str
    """"": the sweep has no sizes."""
    values: Fields
    """Of the axes, by dotted name."""
    config: TrainConfig
    held_out: bool

    @property
    def parameters(self) -> int:
        """N of the fits: without embeddings."""
        return self.config.model.num_parameters(embeddings=False)

    @property
    def tokens(self) -> int:
        """D of the fits: of whole steps."""
        return self.config.tokens_after(self.config.train_steps)


def planned_runs(sweep: Sweep, folder: Path) -> list[PlannedRun]:
    """All runs of a sweep, in its file's order.

    Args:
        folder: the sweep's; each run gets a folder in it.

    Raises:
        UserError: a run's configuration is refused, two runs have one name, or there are too many.
    """
    runs: list[PlannedRun] = []
    for size, values in _points(sweep):
        axes = {name: values[name] for name in sweep.axes if name in values}
        name = _name(size, axes)
        if len(runs) == MOST_RUNS:
            raise UserError(f"the sweep has more than {MOST_RUNS:,} runs: sweep less at once")
        try:
            config = _config(sweep.defaults, values)
        except UserError as error:
            raise UserError(f"run {name}: {error}") from None
        config = with_absolute_paths(replace(config, output_dir=folder / name))
        runs.append(PlannedRun(name, size, axes, config, size in sweep.held_out))
    if not runs:
        raise UserError("[[leave_out]] leaves out every run")
    names = [run.name for run in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two runs would have the name {twice}: give values that differ in letters")
    return runs


def _points(sweep: Sweep) -> Iterator[tuple[str, Fields]]:
    """The size and all values of each run that is not left out."""
    for size, of_size in (sweep.sizes or {"": {}}).items():
        axes = {}
        for name, choices in sweep.axes.items():
            own = of_size.get(name, choices)
            axes[name] = own if isinstance(own, list) else [own]
        budget = next((n for n in (TOKENS, PER_PARAMETER) if n in of_size), None)
        if budget and budget not in axes:  # a size's own budget is in place of the others'
            axes = {n: v for n, v in axes.items() if n not in (TOKENS, PER_PARAMETER)}
        for choice in itertools.product(*axes.values()):
            values = {**sweep.fields, **of_size, **dict(zip(axes, choice, strict=True))}
            known = {**values, SIZE: size}
            if not any(
                all(known.get(name) in v for name, v in table.items()) for table in sweep.leave_out
            ):
                yield size, values


def _config(defaults: TrainConfig, values: Fields) -> TrainConfig:
    values = dict(values)
    tokens, ratio = values.pop(TOKENS, None), values.pop(PER_PARAMETER, None)
    plain = to_dict(defaults)
    for name, value in values.items():
        _put(plain, name, value)
    if tokens is not None and ratio is not None:
        raise UserError(f"{TOKENS} and {PER_PARAMETER} are both given: give one")
    if ratio is not None:
        if type(ratio) not in (int, float) or not 0 < ratio < math.inf:
            raise UserError(f"{PER_PARAMETER} is {short(ratio)}: it must be a number above 0")
        model = from_dict(ModelConfig, plain["model"], where="model")
        tokens = math.ceil(ratio * model.num_parameters(embeddings=False))
    if tokens is not None:
        if values.get("schedule.train_steps") is not None:
            raise UserError(f"schedule.train_steps and {TOKENS} are both given: give one")
        plain["schedule"] |= {"train_steps": None, "train_tokens": tokens}
    config: TrainConfig = from_dict(TrainConfig, plain, where="the configuration")
    return config


def _put(plain: dict[str, Any], name: str, value: Any) -> None:
    """Sets a field in nested values, by its dotted name."""
    *tables, last = name.split(".")
    for table in tables:
        plain = plain.get(table)  # type: ignore[assignment]
        if not isinstance(plain, dict):
            raise UserError(f"no field {name}: docs/reference/configuration.md has all")
    if last not in plain or isinstance(plain[last], dict):
        raise UserError(f"no field {name}: docs/reference/configuration.md has all")
    plain[last] = value


def _name(size: str, values: Fields) -> str:
    """A folder's name. Of a field its last part is enough, where no other axis ends alike."""
    lasts = [name.rpartition(".")[2] for name in values]
    parts = [size] if size else []
    for name, value in values.items():
        last = name.rpartition(".")[2]
        parts.append(f"{last if lasts.count(last) == 1 else name}-{_word(value)}")
    return re.sub(r"[^A-Za-z0-9._+-]", "_", "_".join(parts))


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
