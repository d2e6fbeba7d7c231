"""Between the server's event loop and the engine's thread: requests in, their tokens out."""

import asyncio
import itertools
import queue
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from megatron_ladder.errors import UserError
from megatron_ladder.inference.engine import DynamicEngine
from megatron_ladder.inference.requests import Output, Request, Sampling
from pretrain.inference.engine_loop import Cancel, Command, Stop
from pretrain.inference.metrics import Metrics


class Busy(Exception):
    """As many requests run and wait as may."""


class Closing(Exception):
    """The server is being stopped."""


@dataclass
class _Open:
    outputs: "asyncio.Queue[Output]" = field(default_factory=asyncio.Queue)
    began: float = field(default_factory=time.monotonic)
    is_over: bool = False


class FrontDesk:
    """All methods but `deliver` are called in the event loop. Who has admitted requests releases them.

    Args:
        engine: for what can be asked of it from another thread: whether a request can ever run.
        max_waiting: requests beyond those that run; more are refused.
    """

    def __init__(
        self, engine: DynamicEngine, metrics: Metrics, *, max_running: int, max_waiting: int
    ) -> None:
        self.inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._engine, self._metrics = engine, metrics
        self._most = max_running + max_waiting
        self._open: dict[int, _Open] = {}
        self._ids = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_closing = False

    def admit(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[int]:
        """Sends all of them to the engine, or none; their ids.

        Raises:
            UserError: one can never run.
            Busy, Closing: they cannot now.
        """
        if self.is_closing:
            raise Closing
        requests = [Request(next(self._ids), tuple(prompt), sampling) for prompt in prompts]
        for request in requests:
            self._engine.check(request)
        if len(requests) > self._most:
            raise UserError(f"{len(requests)} prompts in one request: at most {self._most}")
        if len(self._open) + len(requests) > self._most:
            raise Busy
        self._loop = asyncio.get_running_loop()
        for request in requests:
            self._open[request.id] = _Open()
            self.inbox.put(request)
        return [request.id for request in requests]

    async def outputs(self, request_id: int) -> AsyncGenerator[Output, None]:
        """Of a request that has been admitted, until it is over."""
        mine = self._open[request_id]
        is_first = True
        while not mine.is_over:
            output = await mine.outputs.get()
            if is_first and output.new_ids:
                is_first = False
                self._metrics.first_token.observe(time.monotonic() - mine.began)
            mine.is_over = output.finish_reason is not None
            yield output

    def release(self, request_ids: Sequence[int]) -> None:
        """Makes room for others, and ends what still runs. Harmless the second time."""
        for request_id in request_ids:
            if mine := self._open.pop(request_id, None):
                self._metrics.duration.observe(time.monotonic() - mine.began)
                if not mine.is_over:
                    self.inbox.put(Cancel(request_id))

    def close(self) -> None:
        """Refuses what comes from now on."""
        self.is_closing = True

    def stop(self) -> None:
        """Ends the engine's loop."""
        self.inbox.put(Stop())

    def deliver(self, outputs: list[Output]) -> None:
        """Called by the engine's thread after a step."""
        self._metrics.look_at(self._engine, sum(len(output.new_ids) for output in outputs))
        if outputs and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand_out, outputs)

    def _hand_out(self, outputs: list[Output]) -> None:
        for output in outputs:
            if mine := self._open.get(output.id):  # else the client has gone
                mine.outputs.put_nowait(output)
