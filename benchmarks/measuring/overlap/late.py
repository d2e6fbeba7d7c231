"""Backward as it would be without the early start, for comparison."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from megatron_ladder.collectives.points import SubmoduleCollectives


@contextlib.contextmanager
def started_late() -> Iterator[None]:
    """Inside, the sum of an input's gradient starts only where it is waited for.

    Of sub-modules with one reader: attention and MLP of ladder and standard layers.
    """
    cls: Any = SubmoduleCollectives
    start, wait = cls.start_input_gradient, cls.wait_input_gradient
    kept: dict[SubmoduleCollectives, Tensor] = {}

    def start_and_wait(collectives: SubmoduleCollectives) -> Tensor:
        start(collectives, kept.pop(collectives))
        return wait(collectives)

    cls.start_input_gradient = lambda collectives, grad: kept.update({collectives: grad})
    cls.wait_input_gradient = start_and_wait
    try:
        yield
    finally:
        cls.start_input_gradient, cls.wait_input_gradient = start, wait
