"""What is sent back, and which fields inside a request are refused."""

import asyncio
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ladder.errors import UserError
from pretrain.inference.server.answers import Piece, _events, _while_connected
from pretrain.inference.server.protocol import ChatRequest, parse


def test_the_first_words_of_a_streamed_chat_have_the_role() -> None:
    """Also if its first tokens are half a character, or the beginning of a stop text."""

    async def talk() -> None:
        async def pieces() -> AsyncGenerator[Piece, None]:
            for text in ("", "", "é", "x"):
                yield Piece(0, text, (1,), None)

        def choice(piece: Piece, *, is_whole: bool, is_first: bool) -> dict[str, Any]:
            return {"text": piece.text, "is_first": is_first} if piece.text else {}

        sent = [event async for event in _events(pieces(), {}, choice, None)]
        parts = [json.loads(event[6:])["choices"][0] for event in sent[:-1]]
        assert parts == [{"text": "é", "is_first": True}, {"text": "x", "is_first": False}]

    asyncio.run(talk())


def test_a_whole_answer_that_is_cancelled_ends_quietly() -> None:
    async def talk() -> None:
        closed = asyncio.Event()

        async def pieces() -> AsyncGenerator[Piece, None]:
            try:
                await asyncio.Event().wait()
                yield Piece(0, "never", (1,), None)
            finally:
                closed.set()

        async def receive() -> Any:
            await asyncio.Event().wait()

        request: Any = SimpleNamespace(receive=receive)

        async def read() -> None:
            async for _ in _while_connected(request, pieces()):
                raise AssertionError("a piece")

        reading = asyncio.create_task(read())
        for _ in range(5):
            await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert closed.is_set()

    asyncio.run(talk())


@pytest.mark.parametrize(
    ("change", "said_of"),
    [
        ({"messages": [{"role": "user", "content": "a", "prefix": True}]}, "messages.0.prefix"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", "reasoning_content": "c"},
                ]
            },
            "messages.1.reasoning_content",
        ),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage"),
    ],
)
def test_fields_inside_that_would_change_the_answer(change: dict[str, Any], said_of: str) -> None:
    body = {"model": "model", "messages": [{"role": "user", "content": "a"}]}
    with pytest.raises(UserError, match=f"{said_of}.* is not supported"):
        parse(ChatRequest, json.dumps(body | change).encode())
    # As a client sends back what a server has answered.
    sent_back = {"role": "assistant", "content": "b", "refusal": None, "annotations": [], "id": "m"}
    sent_back |= {"tool_calls": [], "audio": None}
    known = {"messages": [sent_back], "stream_options": {"include_obfuscation": False}}
    parse(ChatRequest, json.dumps(body | known).encode())
