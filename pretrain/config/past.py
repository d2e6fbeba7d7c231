"""What the steps trained so far had, where the configuration says otherwise for the steps to come.

A run may be resumed, or branched off another one, with another batch size, length or blend. Which sequences
its steps have read stays as it was. So the configuration of each start also has the values of before.
start/going_on/changes.py writes them.
"""

import math
from dataclasses import dataclass

from megatron_ladder.errors import UserError


@dataclass(frozen=True)
class PastBatchSize:
    """Of the steps up to `last_step`, after those of the entry before."""

    last_step: int
    global_batch_size: int


@dataclass(frozen=True)
class PastBlend:
    """The data sets' weights from a step on."""

    first_step: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Past:
    """Empty where the steps trained so far had what the configuration says."""

    batch_sizes: tuple[PastBatchSize, ...] = ()
    """Before `global_batch_size`, in the order of their steps."""
    blends: tuple[PastBlend, ...] = ()
    """Of the steps up to `blends_to`, in place of data.weights and data.phases."""
    blends_to: int = 0
    drawn: int = 0
    """The number of sequences that the order of the data was drawn for when the run began; sequences after
    them are drawn an epoch at a time. 0: the number of the whole run."""

    def __post_init__(self) -> None:
        ends = [0, *(entry.last_step for entry in self.batch_sizes)]
        first = [blend.first_step for blend in self.blends]
        right = (
            ends == sorted(set(ends))
            and all(entry.global_batch_size > 0 for entry in self.batch_sizes)
            and first == sorted(set(first))
            and (not first or 1 == first[0] <= first[-1] <= self.blends_to)
            and all(math.isfinite(w) and w >= 0 for b in self.blends for w in b.weights)
            and all(sum(blend.weights) > 0 for blend in self.blends)
            and self.drawn >= 0
        )
        if not right:
            raise UserError("past is not what `train` writes: leave it out of a file for --config")
