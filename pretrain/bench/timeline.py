"""stub, to be replaced"""

from dataclasses import dataclass
from typing import Literal

Direction = Literal["forward", "backward", "recompute"]


@dataclass(frozen=True)
class Span:
    rank: int
    kind: Literal["compute", "flight", "wait"]
    name: str
    direction: Direction
    start_s: float
    end_s: float
