"""Connects the server's event loop with the engine's thread: passes requests in and tokens out."""

import asyncio
import itertools
import queue
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from megatron_ladder.errors import UserError
from megatron_ladder.inference.engine import DynamicEngine, Output, Request, Sampling
from pretrain.inference.engine_loop import Cancel, Command, Stop
from pretrain.inference.metrics import Metrics


class Busy(Exception):
    """The limit of running and waiting requests is reached."""


class Closing(Exception):
    """The server is being stopped."""


@dataclass
class _Open:
    outputs: "asyncio.Queue[Output]" = field(default_factory=asyncio.Queue)
    began: float = field(default_factory=time.monotonic)
    is_over: bool = False


class FrontDesk:
    """Admits requests, hands out their tokens, and releases them.

    Call all methods but `deliver` in the event loop. Code that admits requests must release them.

    Args:
        engine: asked only what is safe from another thread: whether a request can ever run.
        metrics: where times are recorded.
        max_running: the number of requests that the engine runs at a time.
        max_waiting: the number of requests that may wait besides; more are refused.
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
        """Sends all prompts to the engine, or none of them.

        Args:
            prompts: token ids of each prompt.
            sampling: the same for all.

        Returns:
            The ids of the requests.

        Raises:
            UserError: a request can never run.
            Busy: too many requests are running and waiting now.
            Closing: the server is being stopped.
        """
        if self.is_closing:
            raise Closing
        requests = [Request(next(self._ids), tuple(prompt), sampling) for prompt in prompts]
        for request in requests:
            self._engine.check(request)
        if len(requests) > self._most:
            raise UserError(
                f"{len(requests)} prompts in one request: at most {self._most} are allowed"
            )
        if len(self._open) + len(requests) > self._most:
            raise Busy
        self._loop = asyncio.get_running_loop()
        for request in requests:
            self._open[request.id] = _Open()
            self.inbox.put(request)
        return [request.id for request in requests]

    async def outputs(self, request_id: int) -> AsyncGenerator[Output, None]:
        """The outputs of an admitted request, until it is over."""
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
        """Makes room for other requests, and cancels those that still run. It may be called twice."""
        for request_id in request_ids:
            if mine := self._open.pop(request_id, None):
                self._metrics.duration.observe(time.monotonic() - mine.began)
                if not mine.is_over:
                    self.inbox.put(Cancel(request_id))

    def close(self) -> None:
        """Refuses all requests from now on."""
        self.is_closing = True

    def stop(self) -> None:
        """Ends the engine's loop."""
        self.inbox.put(Stop())

    def deliver(self, outputs: list[Output]) -> None:
        """Hands out the outputs of a step. The engine's thread calls it."""
        self._metrics.look_at(self._engine, sum(len(output.new_ids) for output in outputs))
        if outputs and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand_out, outputs)

    def _hand_out(self, outputs: list[Output]) -> None:
        for output in outputs:
            if mine := self._open.get(output.id):  # otherwise the request has been released
                mine.outputs.put_nowait(output)
