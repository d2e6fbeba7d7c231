"""Between the server's event loop and the engine's thread: requests in, their tokens out."""

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
    """As many requests run and wait as may."""


class Closing(Exception):
    """The server is being stopped."""


@dataclass
class _Open:
    outputs: "asyncio.Queue[Output]" = field(default_factory=asyncio.Queue)
    began: float = field(default_factory=time.monotonic)
    is_first: bool = True


class FrontDesk:
    """All methods but `deliver` are called in the event loop.

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

    def check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Raises UserError when one can never run, Busy or Closing when they cannot now."""
        if self.is_closing:
            raise Closing
        for prompt in prompts:
            self._engine.check(Request(-1, tuple(prompt), sampling))
        if len(prompts) > self._most:
            raise UserError(f"{len(prompts)} prompts in one request: at most {self._most}")
        if len(self._open) + len(prompts) > self._most:
            raise Busy

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Output, None]:
        """The outputs of one request; closing the iterator early cancels it."""
        self._loop = asyncio.get_running_loop()
        request_id = next(self._ids)
        mine = self._open[request_id] = _Open()
        self.inbox.put(Request(request_id, tuple(prompt), sampling))
        is_over = False
        try:
            while not is_over:
                output = await mine.outputs.get()
                if mine.is_first and output.new_ids:
                    mine.is_first = False
                    self._metrics.first_token.observe(time.monotonic() - mine.began)
                is_over = output.finish_reason is not None
                yield output
        finally:
            del self._open[request_id]
            self._metrics.duration.observe(time.monotonic() - mine.began)
            if not is_over:
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
