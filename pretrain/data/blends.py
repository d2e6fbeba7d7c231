"""The share of each data set in training: one blend, or several, one after another (data.phases).

The order of the sequences up to a step does not depend on the blends of later steps. So a blend may change
while a run is stopped: the steps trained so far keep theirs (config/past.py).
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np

from megatron_ladder.errors import UserError
from pretrain.config.train import TrainConfig
from pretrain.data.folders import DataFolder, labels


@dataclass(frozen=True)
class Blend:
    """The data sets' weights from one step on."""

    first_step: int
    """Steps are counted from 1."""
    weights: tuple[float, ...]
    """One for each data set, in any unit."""

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, scaled so that their sum is 1."""
        total = sum(self.weights)
        return tuple(weight / total for weight in self.weights)


def check_blends(config: TrainConfig) -> None:
    """Checks data.weights and data.phases, but for the steps at which phases begin (`check_phases`).

    Raises:
        UserError: weights that are wrong, or no number of tokens.
    """
    data, count = config.data, len(config.data.paths)
    if data.weights is not None:
        _check_weights("data.weights", data.weights, count)
    for number, phase in enumerate(data.phases):
        name = f"data.phases[{number}]"
        _check_weights(f"{name}.weights", phase.weights, count)
        if type(phase.from_tokens) is not int or phase.from_tokens < 1:
            raise UserError(
                f"{name}.from_tokens is {phase.from_tokens!r}: give a whole number of tokens, 1 or "
                "more; the blend at the start of the run is data.weights"
            )


def check_phases(config: TrainConfig) -> None:
    """Checks that each phase begins after the one before and within the run; and that all data is read.

    Args:
        config: with what the steps trained so far had.

    Raises:
        UserError: a phase does not, or a data set is not read at any time.
    """
    data = config.data
    if data.weights and min(data.weights) == 0 and not data.phases and not config.past.blends:
        raise UserError(
            f"data.weights is {' '.join(map(str, data.weights))}: a data set of weight 0 is never read. "
            "Give one above 0 for each, or leave its path out"
        )
    before = 1
    for number, phase in enumerate(config.data.phases):
        name = f"data.phases[{number}]"
        first = config.steps_for(phase.from_tokens) + 1
        if first <= before:
            raise UserError(
                f"{name}.from_tokens {phase.from_tokens:,} begins at step {first}, and the blend before "
                f"it at step {before}: each phase must begin at least one step "
                f"({config.tokens_per_step:,} tokens) after the blend before it"
            )
        if first > config.train_steps:
            raise UserError(
                f"{name}.from_tokens {phase.from_tokens:,} would begin at step {first}, after the end of "
                f"the run, which has {config.train_steps} steps, "
                f"{config.tokens_after(config.train_steps):,} tokens. Let the phase begin earlier, "
                "leave it out, or train longer"
            )
        before = first


def _check_weights(name: str, weights: tuple[float, ...], count: int) -> None:
    numbers = all(isinstance(w, int | float) and math.isfinite(w) for w in weights)
    if not numbers or len(weights) != count:
        raise UserError(
            f"{name} has {len(weights)} values, {' '.join(map(str, weights))}, for {count} data.paths: "
            "give one of 0 or more for each"
        )
    if min(weights) < 0 or not sum(weights) > 0:
        raise UserError(
            f"{name} is {' '.join(map(str, weights))}: weights must be 0 or more, and not all of them 0"
        )


def blends(config: TrainConfig, folders: list[DataFolder]) -> list[Blend]:
    """The run's blends in their order; the first begins with step 1."""
    start = config.data.weights or tuple(float(folder.tokens("train")) for folder in folders)
    later = [Blend(config.steps_for(p.from_tokens) + 1, p.weights) for p in config.data.phases]
    planned = [Blend(1, start), *later]
    past = config.past
    if not past.blends:
        return planned
    joined = (0.0,) * len(folders)
    trained = [Blend(b.first_step, (*b.weights, *joined)[: len(folders)]) for b in past.blends]
    next_step = past.blends_to + 1
    now = Blend(next_step, in_force(planned, next_step).weights)
    return [*trained, now, *(blend for blend in planned if blend.first_step > next_step)]


def in_force(planned: list[Blend], step: int) -> Blend:
    """The blend that a step is trained with."""
    return [blend for blend in planned if blend.first_step <= step][-1]


def interleave(shares: tuple[float, ...], count: int) -> np.ndarray:
    """Chooses the data set of each of `count` sequences.

    After any number of sequences, each data set has its share of them, to within one sequence. For this,
    sequence i of a data set must lie at a place from floor(i / share) up to ceil((i + 1) / share), the end
    excluded. Among the data sets whose next sequence may lie at a place, the one whose range ends first
    gets the place (proportionate progress, Baruah et al. 1996). megatron-core's build_blending_indices
    takes the data set with the largest deficit, and deviates more from the shares.

    Args:
        shares: of the data sets, with a sum of 1.

    Returns:
        int16 [count], numbers of data sets.
    """
    units = [round(share * 2**40) for share in shares]  # integers, so that nothing is rounded below
    total = sum(units)
    if max(units) == total:  # one data set alone: such as a long run that became longer
        return np.full(count, units.index(total), np.int16)
    taken = [0] * len(units)
    waiting = [(0, i) for i, unit in enumerate(units) if unit]  # (start of range, data set)
    ready: list[tuple[int, int]] = []  # (end of range, data set)
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


def describe(config: TrainConfig, folders: list[DataFolder]) -> str:
    """One line of text for each blend of a run with phases: its steps and the data sets' shares."""
    planned = blends(config, folders)
    lines = []
    for blend, end in zip(planned, ends(planned, config), strict=True):
        shares = ", ".join(
            f"{label} {share:.1%}"
            for label, share in zip(labels(folders), blend.shares, strict=True)
            if share
        )
        lines.append(f"Blend of steps {blend.first_step} to {end}: {shares}")
    return "\n".join(lines)


def ends(planned: list[Blend], config: TrainConfig) -> list[int]:
    """The last step of each blend."""
    return [*(blend.first_step - 1 for blend in planned[1:]), config.train_steps]


@dataclass(frozen=True)
class Stretch:
    """Sequences, one after another, of one blend."""

    first: int
    """Of the run, counted from 0."""
    end: int
    """One after the last."""
    shares: tuple[float, ...]


def stretches(config: TrainConfig, folders: list[DataFolder]) -> list[Stretch]:
    """The whole run in its order. megatron-core draws the first stretch; the others follow it (phased.py).

    One begins with each blend, and one where the sequences that the order was drawn for end.
    """
    found: list[Stretch] = []
    planned = blends(config, folders)
    for blend, last in zip(planned, ends(planned, config), strict=True):
        first, end = config.samples_after(blend.first_step - 1), config.samples_after(last)
        drawn = config.drawn_samples
        if not found and end > drawn:
            found.append(Stretch(0, drawn, blend.shares))
            first = drawn
        if first < end:  # a shorter run may end before a blend
            found.append(Stretch(first, end, blend.shares))
    return found
