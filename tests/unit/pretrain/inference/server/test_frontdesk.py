"""Admission of requests to `serve`, without an engine or HTTP."""

import asyncio
from typing import Any

import pytest

from megatron_ladder.errors import UserError
from megatron_ladder.inference.requests import Output, Request, Sampling
from pretrain.inference.engine_loop import Cancel
from pretrain.inference.server.frontdesk import Busy, Closing, FrontDesk
from pretrain.inference.server.metrics import Metrics

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


def admit(desk: FrontDesk, prompts: list[list[int]]) -> list[int]:
    ids = desk.hold(len(prompts))
    desk.start(ids, prompts, SAMPLING)
    return ids


def test_the_bound_holds_before_any_output_is_asked_for() -> None:
    async def arrivals() -> None:
        front = desk()
        first = admit(front, [[1], [2]])
        with pytest.raises(Busy):
            front.hold(2)  # all of a request, or nothing
        assert not front.is_full
        third = front.hold(1)
        assert front.is_full  # before the third has a prompt
        with pytest.raises(Busy):
            front.hold(1)
        front.start(third, [[5]], SAMPLING)
        assert [request.prompt_ids for request in sent(front)] == [(1,), (2,), (5,)]
        front.release(first)
        front.release(first)
        assert sent(front) == [Cancel(first[0]), Cancel(first[1])]
        assert admit(front, [[7], [8]])
        front.release(third)
        admit(front, [[9]])

    asyncio.run(arrivals())


def test_what_is_refused_leaves_no_place_taken() -> None:
    async def arrivals() -> None:
        front = desk()
        with pytest.raises(UserError, match="too long"):
            front.check([0] * 11, SAMPLING)
        with pytest.raises(UserError, match="4 prompts in one request: at most 3"):
            front.hold(4)
        front.release(front.hold(3))  # they were refused before they had prompts: nothing to cancel
        assert front.inbox.empty()
        admit(front, [[1]] * 3)
        front.close()
        with pytest.raises(Closing):
            front.hold(1)

    asyncio.run(arrivals())


def test_outputs_reach_their_request_and_one_that_is_over_is_not_cancelled() -> None:
    async def generation() -> None:
        front = desk()
        one, two = admit(front, [[1], [2]])
        front.deliver([Output(two, (7,)), Output(one, (8,))])
        front.deliver([Output(one, (9,), "length")])
        assert [output.new_ids async for output in front.outputs(one)] == [(8,), (9,)]
        sent(front)
        front.release([one, two])
        assert sent(front) == [Cancel(two)]

    asyncio.run(generation())
