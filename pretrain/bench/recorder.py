"""Records one step of a decoder: computations of sub-modules, and starts, flights and waits of collectives.

Times are taken on the host. On a CPU, where the host computes, they make a timeline. On a GPU the recorder
waits for each computation, so that its duration is right, but nothing overlaps. For a timeline of a GPU a
profiler is the right tool, as `bench trace` tells its user.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from megatron_ladder.config import PARALLEL
from pretrain.bench.decoder import Decoder
from pretrain.bench.timeline import Direction, Span


@dataclass(frozen=True)
class _Start:
    name: str
    direction: Direction
    at_s: float


class Recorder:
    """An Observer of wire.py. `spans` holds the last step.

    Until `close` it waits for the device at each sub-module. That makes the decoder slow on a GPU, where
    kernels are otherwise queued ahead.
    """

    def __init__(self, decoder: Decoder, rank: int) -> None:
        self.spans: list[Span] = []
        self._rank, self._decoder = rank, decoder
        self._in_backward = False
        self._running: str | None = None  # the sub-module whose forward is being computed
        self._counts: dict[tuple[str, str], int] = {}
        self._names: list[str] = []
        self._hooks: list[Any] = []
        # Attention and MLP of parallel kinds share one collective.
        shared = ("layer",) if decoder.model.residual in PARALLEL else ("attention", "mlp")
        for number, layer in enumerate(decoder.block.layers, 1):
            # megatron-core's own layers have no such attribute.
            halves = ("a", "b") if getattr(layer, "halves", False) else ("",)
            for kind, module, first in (
                ("attention", layer.self_attention, layer.self_attention.linear_qkv),
                ("mlp", layer.mlp, layer.mlp.linear_fc1),
            ):
                self._watch([f"{kind} {number}{half}" for half in halves], module, first)
            self._names += [f"{kind} {number}{half}" for kind in shared for half in halves]

    def close(self) -> None:
        """Removes the hooks, so that the decoder is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def step(self) -> list[Span]:
        """Runs a step; returns its spans in the order of their ends."""
        self._decoder.clear()
        self._begin()
        output = self._decoder.forward()
        self._in_backward = True
        self._decoder.backward(output)
        return self._computations_apart()

    def forward(self, run: Callable[[], object]) -> list[Span]:
        """Runs a pass without backward; returns its spans in the order of their ends."""
        self._begin()
        run()
        return self._computations_apart()

    def _begin(self) -> None:
        self.spans, self._counts = [], {}
        self._in_backward = False

    def _computations_apart(self) -> list[Span]:
        return [part for span in self.spans for part in self._without_waits(span)]

    @property
    def _direction(self) -> Direction:
        if not self._in_backward:
            return "forward"
        return "backward" if self._running is None else "recompute"

    def _watch(self, names: list[str], module: Any, first_linear: Any) -> None:
        """Records a sub-module's computations.

        Args:
            names: of its calls in a pass, in their order. Backward has the reverse order.
            module: attention or MLP.
            first_linear: with its backward the sub-module's backward ends.
        """
        since: dict[str, float] = {}

        def forward_begins(*_: Any) -> None:
            direction = "backward" if self._in_backward else "forward"
            call = self._count(names[0], direction) % len(names)
            self._running = names[-1 - call if self._in_backward else call]
            since[self._running] = _now()

        def forward_ends(_module: Any, _inputs: Any, output: Any) -> None:
            name = self._running
            assert name is not None
            self._add("compute", name, self._direction, since[name])
            self._running = None

            def backward_begins(*_: Any) -> None:
                since[name] = _now()

            if output[0].grad_fn is not None:
                output[0].grad_fn.register_prehook(backward_begins)

        def first_linear_ends(_module: Any, _inputs: Any, output: Any) -> None:
            name = self._running
            assert name is not None

            def backward_ends(*_: Any) -> None:
                self._add("compute", name, "backward", since[name])

            if output[0].grad_fn is not None:
                output[0].grad_fn.register_hook(backward_ends)

        self._hooks += [
            module.register_forward_pre_hook(forward_begins),
            module.register_forward_hook(forward_ends),
            first_linear.register_forward_hook(first_linear_ends),
        ]

    def _add(
        self, kind: str, name: str, direction: Direction, since: float, until: float | None = None
    ) -> None:
        until = _now() if until is None else until
        self.spans.append(Span(self._rank, cast(Any, kind), name, direction, since, until))

    # The methods of wire.Observer.

    def started(self, operation: str, at_s: float) -> _Start:
        direction = self._direction
        if direction == "recompute":  # a blocking collective in one of megatron-core's layers
            assert self._running is not None
            return _Start(self._running, direction, at_s)
        # Collectives of one sort run in the order of the sub-modules, in backward in the reverse order.
        # With sequence parallelism each sub-module has two all-gathers in backward.
        count = self._count(operation, direction)
        if direction == "forward":
            return _Start(self._names[count], direction, at_s)
        each = 2 if operation == "all-gather" and self._gathers_twice else 1
        return _Start(self._names[-1 - count // each], direction, at_s)

    @property
    def _gathers_twice(self) -> bool:
        return self._decoder.model.residual not in PARALLEL

    def _count(self, of: str, direction: str) -> int:
        """How often this was called before, in this step."""
        count = self._counts.get((of, direction), 0)
        self._counts[of, direction] = count + 1
        return count

    def waited(self, key: _Start, since_s: float, until_s: float, arrived_s: float) -> None:
        self._add("flight", key.name, key.direction, key.at_s, arrived_s)
        self._add("wait", key.name, key.direction, since_s, until_s)

    def _without_waits(self, span: Span) -> list[Span]:
        """Cuts a computation into the parts between the waits inside it; other spans stay as they are."""
        if span.kind != "compute":
            return [span]
        inside = [
            w
            for w in self.spans
            if w.kind == "wait" and span.start_s <= w.start_s and w.end_s <= span.end_s
        ]
        edges = [span.start_s, *(t for w in inside for t in (w.start_s, w.end_s)), span.end_s]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return [replace(span, start_s=a, end_s=b) for a, b in pairs if b > a]


def _now() -> float:
    torch.cuda.synchronize()  # nothing on a CPU: cpu_platform.py
    return time.perf_counter()
