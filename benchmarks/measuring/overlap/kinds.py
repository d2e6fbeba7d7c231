"""The kinds of layers that overlap.py compares, and how each is built."""

from dataclasses import dataclass
from typing import Any

from megatron_ladder.config import STALE, Residual, TpOverlap
from pretrain.bench.kinds_plan import NO_COMM


@dataclass(frozen=True)
class Kind:
    residual: Residual
    halves: bool = False
    """Two halves of the micro-batch take turns (`ParallelConfig.tp_overlap`)."""
    last_half: bool = False
    """Of the layers only the last half; the others are standard."""

    def model_fields(self, layers: int) -> dict[str, Any]:
        """Those of ModelConfig."""
        chosen = {"ladder_layers": layers // 2} if self.last_half else {}
        return {"residual": self.residual, **chosen}

    @property
    def tp_overlap(self) -> TpOverlap:
        return "halves" if self.halves else "none"

    @property
    def hides(self) -> bool:
        """Whether every layer hides its collectives behind other computation."""
        return not self.last_half and (self.halves or self.residual in STALE)


KINDS = {
    "standard": Kind("standard"),
    "standard in halves": Kind("standard", halves=True),
    "parallel": Kind("parallel"),
    "parallel in halves": Kind("parallel", halves=True),
    "ladder": Kind("ladder"),
    "hybrid (last half)": Kind("ladder", last_half=True),
    "parallel-ladder": Kind("parallel-ladder"),
    NO_COMM: Kind("no-comm"),
}
ALWAYS = ("standard", "ladder")
# What else can be measured, by the words of `--also`.
ALSO = {
    "standard-halves": "standard in halves",
    "parallel": "parallel",
    "parallel-halves": "parallel in halves",
    "hybrid": "hybrid (last half)",
    "parallel-ladder": "parallel-ladder",
    NO_COMM: NO_COMM,
}


def chosen(also: list[str], micro_batch_size: int) -> tuple[list[str], dict[str, str]]:
    """Names of the kinds to measure, in the order of KINDS, and why others were left out."""
    wanted = {*ALWAYS, *(ALSO[word] for word in also if word in ALSO)}
    odd = micro_batch_size % 2 == 1
    left_out = {
        name: f"a micro-batch of {micro_batch_size} has no two equal halves"
        for name in KINDS
        if name in wanted and odd and KINDS[name].halves
    }
    return [name for name in KINDS if name in wanted and name not in left_out], left_out
