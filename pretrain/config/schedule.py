"""How long a run trains, how its learning rate goes, and the number of sequences of each step."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megatron_ladder.errors import UserError
from pretrain.config.past import PastBatchSize

Ramp = tuple[int, int, int]
"""The first batch size, what is added at a time, and the sequences until the last size."""


@dataclass(frozen=True)
class ScheduleConfig:
    """How long to train and how the learning rate goes. Each length in steps or in tokens."""

    train_steps: int | None = None
    train_tokens: int | None = None
    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    decay: Literal["cosine", "wsd"] = "cosine"
    """cosine: down from the end of warm-up. wsd: warm-up, stable, then down in the last part."""
    wsd_decay_fraction: float = 0.2
    """The share of training in which wsd goes down, linearly, from the end of warm-up at the earliest; 0:
    it does not, and runs branch off it."""
    wsd_decay_steps: int | None = None
    """The same in steps, in place of the share."""
    min_lr_fraction: float = 0.1
    """The last learning rate over the peak."""
    rampup_batch_size: tuple[int, int, int] | None = None
    """START INCREMENT SAMPLES: the first steps have START sequences, and INCREMENT more in even parts of
    the first SAMPLES sequences, up to global_batch_size. None: all steps have global_batch_size."""


@dataclass(frozen=True)
class BatchSizes:
    """The number of sequences of each step."""

    first: tuple[PastBatchSize, ...]
    """Of the first steps, in their order."""
    last: int
    """Of all later steps."""

    def of(self, step: int) -> int:
        """The sequences of one step, counted from 1."""
        sizes = (entry.global_batch_size for entry in self.first if step <= entry.last_step)
        return next(sizes, self.last)

    def samples_after(self, step: int) -> int:
        """The sequences of the first `step` steps."""
        samples, before = 0, 0
        for entry in self.first:
            samples += (min(step, entry.last_step) - before) * entry.global_batch_size
            before = min(step, entry.last_step)
        return samples + (step - before) * self.last

    def steps_for(self, samples: int) -> int:
        """The least number of steps that have at least `samples` sequences."""
        before = 0
        for entry in self.first:
            steps = entry.last_step - before
            if steps * entry.global_batch_size >= samples:
                return before + -(-samples // entry.global_batch_size)
            samples -= steps * entry.global_batch_size
            before = entry.last_step
        return before + -(-samples // self.last)

    def up_to(self, step: int) -> tuple[PastBatchSize, ...]:
        """Those of the first `step` steps, which may be no more than 0."""
        begun = [entry for entry in self.first if entry.last_step < step]
        return (*begun, PastBatchSize(step, self.of(step))) if step else ()

    def counts(self, steps: int) -> dict[int, int]:
        """Each size, and how many of the first `steps` steps have it."""
        found: dict[int, int] = {}
        before = 0
        for entry in self.up_to(steps):
            size = entry.global_batch_size
            found[size] = found.get(size, 0) + entry.last_step - before
            before = entry.last_step
        return found


@lru_cache(maxsize=64)
def batch_sizes(past: tuple[PastBatchSize, ...], ramp: Ramp | None, last: int) -> BatchSizes:
    """The sequences of each step: those of the steps so far, then by the ramp, then `last`.

    As Megatron's --rampup-batch-size: the size of a step depends on the sequences of all steps before it.
    """
    sizes = BatchSizes(past, last)
    if ramp is None:
        return sizes
    start, increment, end = ramp
    increments = (last - start) // increment
    step = past[-1].last_step if past else 0
    samples, entries = sizes.samples_after(step), list(past)
    while samples < end:
        level = samples * increments // end
        size = start + level * increment
        missing = (level + 1) * end - samples * increments  # times `increments`, to the next level
        steps = -(-missing // (increments * size))
        step, samples = step + steps, samples + steps * size
        entries.append(PastBatchSize(step, size))
    return BatchSizes(tuple(entries), last)


def check_ramp(ramp: Ramp | None, last: int) -> None:
    """Refuses a ramp that does not lead to the last batch size.

    Raises:
        UserError: it says what to give.
    """
    if ramp is None:
        return
    start, increment, samples = ramp
    given = f"schedule.rampup_batch_size is {start} {increment} {samples}"
    if min(ramp) < 1:
        raise UserError(f"{given}: give three numbers of at least 1")
    if start >= last:
        raise UserError(
            f"{given}: it begins with {start} sequences, and global_batch_size is {last}. Begin with fewer"
        )
    if (last - start) % increment:
        raise UserError(
            f"{given}: steps of {increment} do not lead from {start} to global_batch_size {last}. Give an "
            f"increment that divides {last - start}"
        )
