"""Connects the server's event loop with the engine's thread: passes requests in and tokens out."""

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
from pretrain.inference.server.metrics import Metrics


class Busy(Exception):
    """The limit of running and waiting requests is reached."""


class Closing(Exception):
    """The server is being stopped."""


@dataclass
class _Open:
    outputs: "asyncio.Queue[Output]" = field(default_factory=asyncio.Queue)
    began: float = field(default_factory=time.monotonic)
    is_over: bool = True
    """Whether the engine has nothing to do for it: it has ended, or has not started."""


class FrontDesk:
    """Admits requests, hands out their tokens, and releases them.

    Call all methods but `deliver` and `check` in the event loop. Code that holds places must release them.

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

    @property
    def is_full(self) -> bool:
        """Whether not one request more may run or wait."""
        return len(self._open) >= self._most

    def hold(self, count: int) -> list[int]:
        """Keeps places for so many requests, or for none of them. It costs little: call it before prompts
        are encoded.

        Returns:
            The ids of the requests.

        Raises:
            UserError: they can never run together.
            Busy: too many requests are running and waiting now.
            Closing: the server is being stopped.
        """
        if self.is_closing:
            raise Closing
        if count > self._most:
            raise UserError(f"{count} prompts in one request: at most {self._most} are allowed")
        if len(self._open) + count > self._most:
            raise Busy
        ids = [next(self._ids) for _ in range(count)]
        self._open.update((request_id, _Open()) for request_id in ids)
        return ids

    def check(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """Raises UserError when a request can never run. Any thread may call it."""
        self._engine.check(Request(-1, tuple(prompt), sampling))

    def start(
        self, ids: Sequence[int], prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> None:
        """Sends requests to the engine, of which `check` has nothing to say.

        Args:
            ids: from `hold`.
            prompts: token ids, a prompt for each of the ids.
            sampling: the same for all.
        """
        self._loop = asyncio.get_running_loop()
        for request_id, prompt in zip(ids, prompts, strict=True):
            self._open[request_id].is_over = False
            self.inbox.put(Request(request_id, tuple(prompt), sampling))

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
