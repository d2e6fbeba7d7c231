"""An all-to-all, split into a start and a wait, and the one of its gradients in backward.

    start -> [other work] -> wait        in backward: start of the gradients' -> [other work] -> wait

Backward runs the two nodes in the opposite order: that of `wait` starts the exchange of the gradients, that
of `start` waits for it. Between the two, autograd runs the backward of what ran between them in forward.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ladder.collectives.flight import Flight, uncounted, used_here
from megatron_ladder.collectives.ranges import named


class AllToAll:
    """One exchange of rows of tensors between ranks, forward and backward.

    Args:
        name: for a profiler's ranges.
        group: the ranks.
        sends: rows for each rank. None: as many for each.
        receives: rows from each rank. None: as many from each.
    """

    def __init__(
        self,
        name: str,
        group: dist.ProcessGroup,
        sends: Sequence[int] | None,
        receives: Sequence[int] | None,
    ) -> None:
        self.name, self._group = name, group
        self._sends, self._receives = sends, receives
        self._flights: list[Flight] = []
        self._gradients: list[Flight] = []

    def start(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Starts to exchange the rows of tensors, each [rows, ...]. Returns what will arrive: read it only
        after `wait`."""
        return tensors if self._group.size() == 1 else _Start.apply(self, *tensors)

    def wait(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Waits for what `start` has returned. Returns it, complete."""
        if self._group.size() == 1:
            return tuple(map(used_here, tensors))  # another stream may have made them
        return _Wait.apply(self, *tensors)

    def fly(self, tensors: Sequence[Tensor]) -> list[Flight]:
        with named(f"{self.name}: start"):
            self._flights = [self._sent(x, self._sends, self._receives) for x in tensors]
        return self._flights

    def land(self) -> None:
        flights, self._flights = self._flights, []
        with named(f"{self.name}: wait"):
            for flight in flights:
                flight.arrive()

    def fly_back(self, gradients: Sequence[Tensor]) -> None:
        with named(f"{self.name} gradient: start"):
            self._gradients = [self._sent(x, self._receives, self._sends) for x in gradients]

    def land_back(self) -> tuple[Tensor, ...]:
        flights, self._gradients = self._gradients, []
        with named(f"{self.name} gradient: wait"):
            return tuple(flight.arrive() for flight in flights)

    def _sent(
        self, x: Tensor, sends: Sequence[int] | None, receives: Sequence[int] | None
    ) -> Flight:
        x = x.contiguous()
        out = x.new_empty((x.size(0) if receives is None else sum(receives), *x.shape[1:]))
        work = dist.all_to_all_single(
            uncounted(out), x, receives, sends, group=self._group, async_op=True
        )
        return Flight(out, x, work)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: AllToAll, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.exchange = exchange
        return tuple(flight.result for flight in exchange.fly([x.detach() for x in tensors]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # `_Wait` returns no gradient to autograd, which could copy it before it has arrived.
        assert not any(grad is not None for grad in grads), "the exchange was not waited for"
        return None, *ctx.exchange.land_back()


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: AllToAll, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.count = exchange, len(tensors)
        exchange.land()
        return tuple(used_here(x.view_as(x)) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ctx.exchange.fly_back(grads)
        return (None,) * (1 + ctx.count)
