"""Admission of requests to `serve`, without an engine or HTTP."""

import asyncio
from typing import Any

import pytest

from megatron_ladder.errors import UserError
from megatron_ladder.inference.requests import Output, Request, Sampling
from pretrain.inference.engine_loop import Cancel
from pretrain.inference.frontdesk import Busy, Closing, FrontDesk
from pretrain.inference.metrics import Metrics

SAMPLING = Sampling(max_new_tokens=4)


class Engine:
    """Takes prompts of up to ten tokens."""

    num_running = num_waiting = free_blocks = 0

    def check(self, request: Request) -> None:
        if len(request.prompt_ids) > 10:
            raise UserError("too long")


def desk() -> FrontDesk:
    engine: Any = Engine()
    return FrontDesk(engine, Metrics(), max_running=2, max_waiting=1)


def sent(desk: FrontDesk) -> list[Any]:
    """What the engine's loop finds."""
    return [desk.inbox.get_nowait() for _ in range(desk.inbox.qsize())]


def test_the_bound_holds_before_any_output_is_asked_for() -> None:
    async def arrivals() -> None:
        front = desk()
        first = front.admit([[1], [2]], SAMPLING)
        with pytest.raises(Busy):
            front.admit([[3], [4]], SAMPLING)  # all of a request, or nothing
        third = front.admit([[5]], SAMPLING)
        with pytest.raises(Busy):
            front.admit([[6]], SAMPLING)
        assert [request.prompt_ids for request in sent(front)] == [(1,), (2,), (5,)]
        front.release(first)
        front.release(first)
        assert sent(front) == [Cancel(first[0]), Cancel(first[1])]
        assert front.admit([[7], [8]], SAMPLING)
        front.release(third)
        front.admit([[9]], SAMPLING)

    asyncio.run(arrivals())


def test_what_is_refused_leaves_no_place_taken() -> None:
    async def arrivals() -> None:
        front = desk()
        with pytest.raises(UserError, match="too long"):
            front.admit([[1], [0] * 11], SAMPLING)
        with pytest.raises(UserError, match="4 prompts in one request: at most 3"):
            front.admit([[1]] * 4, SAMPLING)
        assert front.inbox.empty()
        front.admit([[1]] * 3, SAMPLING)
        front.close()
        with pytest.raises(Closing):
            front.admit([[1]], SAMPLING)

    asyncio.run(arrivals())


def test_outputs_reach_their_request_and_one_that_is_over_is_not_cancelled() -> None:
    async def generation() -> None:
        front = desk()
        one, two = front.admit([[1], [2]], SAMPLING)
        front.deliver([Output(two, (7,)), Output(one, (8,))])
        front.deliver([Output(one, (9,), "length")])
        assert [output.new_ids async for output in front.outputs(one)] == [(8,), (9,)]
        sent(front)
        front.release([one, two])
        assert sent(front) == [Cancel(two)]

    asyncio.run(generation())
