"""What share of each data set a run trains on: one blend, or several one after another (data.phases).

The order up to a step depends on nothing after it. So what comes later may be changed while a run is
stopped, and what it has trained on may not: `check_past`.
"""

import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_ladder.errors import UserError
from pretrain.config import TrainConfig, load_config
from pretrain.run_folder import checkpoint_step, latest_checkpoint

if TYPE_CHECKING:
    from pretrain.data import DataFolder


@dataclass(frozen=True)
class Blend:
    """Weights that hold from a step on."""

    first_step: int
    """Steps are counted from 1."""
    weights: tuple[float, ...]
    """One for each data set, in any unit."""

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, adding up to 1."""
        total = sum(self.weights)
        return tuple(weight / total for weight in self.weights)


def check_blends(config: TrainConfig) -> None:
    """Refuses weights and phases that mean nothing."""
    data, count = config.data, len(config.data.paths)
    if data.weights is not None and not data.phases:
        _check_weights("data.weights", data.weights, count, least="above 0")
    elif data.weights is not None:
        _check_weights("data.weights", data.weights, count, least="of 0 or more")
    before = 1
    for number, phase in enumerate(data.phases):
        name = f"data.phases[{number}]"
        _check_weights(f"{name}.weights", phase.weights, count, least="of 0 or more")
        if type(phase.from_tokens) is not int or phase.from_tokens < 1:
            raise UserError(
                f"{name}.from_tokens is {phase.from_tokens!r}: give a whole number of tokens, 1 or "
                "more; data.weights is the blend from the start on"
            )
        first = config.steps_for(phase.from_tokens) + 1
        if first <= before:
            raise UserError(
                f"{name}.from_tokens {phase.from_tokens:,} begins at step {first}, and the blend before "
                f"it at step {before}: each phase begins at least one step "
                f"({config.tokens_per_step:,} tokens) after the one before"
            )
        if first > config.train_steps:
            raise UserError(
                f"{name}.from_tokens {phase.from_tokens:,} would begin at step {first}, after the run's "
                f"end: it has {config.train_steps} steps, "
                f"{config.train_steps * config.tokens_per_step:,} tokens. Begin it earlier, leave it "
                "out, or train longer"
            )
        before = first


def _check_weights(name: str, weights: tuple[float, ...], count: int, least: str) -> None:
    numbers = all(isinstance(w, int | float) and math.isfinite(w) for w in weights)
    if not numbers or len(weights) != count or (least == "above 0" and min(weights) <= 0):
        raise UserError(
            f"{name} has {len(weights)} values, {' '.join(map(str, weights))}, for {count} data.paths: "
            f"give one {least} for each"
        )
    if min(weights) < 0 or not sum(weights) > 0:
        raise UserError(
            f"{name} is {' '.join(map(str, weights))}: weights are 0 or more, and not all of them 0"
        )


def blends(config: TrainConfig, folders: "list[DataFolder]") -> list[Blend]:
    """The run's blends in their order; the first begins with step 1."""
    start = config.data.weights or tuple(float(folder.tokens("train")) for folder in folders)
    later = [Blend(config.steps_for(p.from_tokens) + 1, p.weights) for p in config.data.phases]
    return [Blend(1, start), *later]


def interleave(shares: tuple[float, ...], count: int) -> np.ndarray:
    """The data set of each of `count` sequences, int16.

    However many are taken from the beginning, each data set has its share within one sequence: its
    sequence i has a place from floor(i / share) up to ceil((i + 1) / share), and of those that may come
    the one that has to come first does (proportionate progress, Baruah et al. 1996). megatron-core's
    build_blending_indices, which takes the largest deficit, strays further.
    """
    units = [round(share * 2**40) for share in shares]  # whole numbers: nothing is rounded below
    total = sum(units)
    taken = [0] * len(units)
    waiting = [(0, i) for i, unit in enumerate(units) if unit]  # (first place, data set)
    ready: list[tuple[int, int]] = []  # (the place before which it comes, data set)
    order = np.empty(count, np.int16)
    for place in range(count):
        while waiting and waiting[0][0] <= place:
            _, i = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(taken[i] + 1) * total // units[i]), i))
        _, i = heapq.heappop(ready)
        order[place] = i
        taken[i] += 1
        heapq.heappush(waiting, (taken[i] * total // units[i], i))
    return order


def check_past(config: TrainConfig, folders: "list[DataFolder]") -> None:
    """Refuses to resume a run with data sets or blends other than those it has been trained on."""
    assert config.output_dir is not None
    saved = config.output_dir / "config.json"
    if not saved.is_file():
        return
    old = load_config(saved)
    paths = old.data.paths
    if config.data.paths[: len(paths)] != paths:
        raise UserError(
            f"{config.output_dir} trains on data.paths {' '.join(map(str, paths))}: keep them first and "
            "in their order. Others may follow them; a weight of 0 in a phase leaves one out"
        )
    latest = latest_checkpoint(config.output_dir)
    step = checkpoint_step(latest) if latest else 0
    past = [b for b in blends(old, folders[: len(paths)]) if b.first_step <= step]
    now = [b for b in blends(config, folders) if b.first_step <= step]
    joined = (0.0,) * (len(folders) - len(paths))
    if [(b.first_step, (*b.shares, *joined)) for b in past] != [
        (b.first_step, b.shares) for b in now
    ]:
        was = "; ".join(_words(Blend(b.first_step, (*b.weights, *joined))) for b in past)
        raise UserError(
            f"{config.output_dir} has been trained to step {step} ({step * config.tokens_per_step:,} "
            f"tokens) with the weights {was}. data.weights and data.phases now say "
            f"{'; '.join(map(_words, now))}: a blend may change only after that step; put a change into "
            "data.phases, and leave what was before it"
        )


def _words(blend: Blend) -> str:
    return f"{' '.join(f'{w:.17g}' for w in blend.weights)} from step {blend.first_step} on"


def describe(config: TrainConfig, folders: "list[DataFolder]") -> str:
    """The blends of a run with phases, a line for each."""
    planned = blends(config, folders)
    lines = []
    for blend, end in zip(planned, ends(planned, config), strict=True):
        shares = ", ".join(
            f"{folder.name} {share:.1%}"
            for folder, share in zip(folders, blend.shares, strict=True)
            if share
        )
        lines.append(f"Blend of steps {blend.first_step} to {end}: {shares}")
    return "\n".join(lines)


def ends(planned: list[Blend], config: TrainConfig) -> list[int]:
    """The last step of each blend."""
    return [*(blend.first_step - 1 for blend in planned[1:]), config.train_steps]
