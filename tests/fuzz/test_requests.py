"""Random requests to `serve`, in this process: each is answered, or refused in a sentence of OpenAI's form.

No exception, no place that stays taken, no memory that grows.
"""

import asyncio
import json
import resource
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.server import ServerState

from pretrain.inference.server.connections import Connection
from pretrain.inference.server.protocol import HARMLESS, NEUTRAL, NEUTRAL_OF_CHAT
from tests.unit.pretrain.inference.server.stand_in import StandIn

STATUSES = {200, 400, 404, 405, 408, 413, 429, 503}
MOST_GROWTH = 64 << 10  # KiB, for one request
PATHS = ("/v1/completions", "/v1/chat/completions")

INPUTS = 10
"""Of an example. hypothesis draws their seed alone: drawing each value would take most of the time."""
SEEDS = st.integers(0, (1 << 64) - 1)
# Numbers at the edges of types and of limits; texts that are half a character, a token, nothing, or long.
INTEGERS = (
    0,
    1,
    -1,
    2,
    4,
    16,
    17,
    63,
    64,
    65,
    299,
    300,
    1 << 31,
    -(1 << 31),
    1 << 63,
    1 << 80,
    10**40,
)
FLOATS = (0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"), 1.5, 2.0)
TEXTS = (
    "",
    "a",
    "quick brown fox",
    "\x00",
    "\ud800",
    "\ufffd",
    "model",
    "<|eot_id|>",
    "a ",
    "[",
    '"',
)
TEXTS += ("\\", "\u00e9", "\U0001f98a", "text", "user", "none")
ROLES = (
    *("user", "assistant") * 9,
    "user",
    "assistant",
    "system",
    "developer",
    "tool",
    "function",
    "x",
    None,
    5,
)
OTHERS = (*HARMLESS, *NEUTRAL, *NEUTRAL_OF_CHAT, "max_token", "__class__", "model_extra", "\ud800")


def value(r: Random, depth: int = 2) -> Any:
    """A value of any type."""
    kind = r.randrange(9 if depth else 5)
    if kind < 5:
        scalars = (None, r.random() < 0.5, r.choice(INTEGERS), r.choice(FLOATS), text(r))
        return scalars[kind]
    if kind < 7:
        return [value(r, depth - 1) for _ in range(r.randrange(5))]
    if kind < 8:
        return {text(r): value(r, depth - 1) for _ in range(r.randrange(4))}
    return [value(r, depth - 1)] * r.randrange(300)


def text(r: Random) -> str:
    """A short text, or one that is repeated."""
    return r.choice(TEXTS) * (r.randrange(300) if r.random() < 0.1 else 1)


def ids(r: Random, most: int = 9) -> list[int]:
    """Token ids, nearly all of which the model has."""
    return [r.randrange(-1 if r.random() < 0.01 else 0, 304) for _ in range(r.randrange(most))]


def message(r: Random) -> Any:
    """A turn of a conversation."""
    content: Any = text(r)
    if r.random() < 0.2:
        content = [{"type": r.choice(("text", "text", "image")), "text": text(r)} for _ in range(3)]
    said = {"role": r.choice(ROLES), "content": value(r) if r.random() < 0.1 else content}
    if r.random() < 0.1:
        said[r.choice(("name", "tool_calls", "function_call", "x"))] = value(r)
    return value(r) if r.random() < 0.05 else said


TYPED: dict[str, Callable[[Random], Any]] = {
    "max_tokens": lambda r: r.randrange(-1, 50),
    "max_completion_tokens": lambda r: r.randrange(-1, 50),
    "n": lambda r: r.randrange(0, 18),
    "temperature": lambda r: r.choice((0.7, 1, *FLOATS)),
    "top_p": lambda r: r.choice((0.9, 1, *FLOATS)),
    "top_k": lambda r: r.randrange(-2, 400),
    "stop": lambda r: [text(r) for _ in range(r.randrange(6))],
    "stop_token_ids": ids,
    "stream": lambda r: r.random() < 0.8,
    "stream_options": lambda r: {"include_usage": r.random() < 0.5},
    "echo": lambda r: r.random() < 0.5,
    "ignore_eos": lambda r: r.random() < 0.5,
    "min_tokens": lambda r: r.randrange(-1, 20),
    "repetition_penalty": lambda r: r.choice((1.0, 1.1, *FLOATS)),
    "best_of": lambda r: r.randrange(3),
    "chat_template_kwargs": lambda r: {},
}


OF_CHAT = ("max_completion_tokens", "chat_template_kwargs")
OF_COMPLETIONS = ("echo", "best_of")


def request(r: Random, path: str) -> dict[str, Any]:
    """The body of a request, right or wrong."""
    is_chat = path == PATHS[1]
    body: dict[str, Any] = {"model": "model"}
    if is_chat:
        body["messages"] = [message(r) for _ in range(r.randrange(4))]
    else:
        many = ([text(r) for _ in range(r.randrange(9))], [ids(r) for _ in range(r.randrange(9))])
        body["prompt"] = r.choice((text(r), ids(r, 70), *many))
    others = OF_COMPLETIONS if is_chat else OF_CHAT
    for name in r.sample(tuple(TYPED), r.randrange(4)):
        if name not in others or r.random() < 0.05:
            body[name] = TYPED[name](r)
    if r.random() < 0.3:
        body[r.choice(tuple(body))] = value(r)
    if r.random() < 0.2:
        body[r.choice(OTHERS)] = value(r)
    if r.random() < 0.05:
        del body[r.choice(tuple(body))]
    return body


class Place:
    """An event loop with an application in it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.problems: list[Any] = []
        self.loop.set_exception_handler(lambda _, context: self.problems.append(context))
        self.stand_in = StandIn()

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """The answer's status and content."""
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        answer: list[Any] = []

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            answer.append(message)

        scope: dict[str, Any] = {
            "type": "http",
            "path": path,
            "method": "POST",
            "query_string": b"",
        }
        scope["headers"] = [(b"content-type", b"application/json")]
        self.loop.run_until_complete(self.stand_in.app(scope, receive, send))
        return answer[0]["status"], b"".join(part.get("body", b"") for part in answer[1:])

    def check(self, path: str, body: bytes) -> int:
        """Sends a request, and checks its answer; its status."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        status, content = self.post(path, body)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH
        assert status in STATUSES, (status, content)
        if status != 200:
            error = json.loads(content)["error"]
            assert error["message"] and error["type"] and len(content) < 8000
        elif content.startswith(b"data: "):
            assert content.endswith(b"data: [DONE]\n\n")
        else:
            assert json.loads(content)["choices"]
        assert self.stand_in.is_idle
        assert self.problems == []
        return status


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.loop.run_until_complete(place.loop.shutdown_asyncgens())
    place.loop.close()


@given(SEEDS)
def test_objects_of_json(place: Place, seed: int) -> None:
    r = Random(seed)
    for path in PATHS * (INPUTS // 2):
        place.check(path, json.dumps(request(r, path)).encode())


MORE = (
    (b"", 0),
    (b"", 0),
    (b"[", 40),
    (b"[", 90_000),
    (b'{"a":', 90_000),
    (b" ", 70_000),
    (b"[],", 99_000),
)


@given(SEEDS)
def test_bytes(place: Place, seed: int) -> None:
    """A body of which bytes are replaced, left out or added."""
    r = Random(seed)
    for path in PATHS * (INPUTS // 2):
        sent = json.dumps(request(r, path), ensure_ascii=r.random() < 0.5).encode(
            errors="surrogatepass"
        )
        for _ in range(r.randrange(4)):
            at = r.randrange(len(sent) + 1)
            sent = sent[:at] + r.randbytes(r.randrange(4)) + sent[at + r.randrange(4) :]
        if r.random() < 0.02:
            more, times = r.choice(MORE)
            at = r.randrange(len(sent) + 1)
            sent = sent[:at] + more * times + sent[at:]
        place.check(path, sent)


class Wire(asyncio.Transport):
    """What a connection writes, and whether it has closed."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.closed = bytearray(), False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


LINES = (
    *(
        b"GET /health HTTP/1.1\r\n",
        b"POST /v1/completions HTTP/1.1\r\n",
        b"HEAD /metrics HTTP/1.0\r\n",
    ),
    *(
        b"OPTIONS * HTTP/1.1\r\n",
        b"GET /v1/models/%ff%00/.. HTTP/1.1\r\n",
        b"PUT /v1/x?y HTTP/9.9\r\n",
    ),
    *(
        b"Host: model\r\n",
        b"Content-Length: 2\r\n",
        b"Content-Length: -1\r\n",
        b"\r\n",
        b"\r\n\r\n",
    ),
    *(b"Content-Length: " + b"9" * 30 + b"\r\n", b"Content-Type: application/json\r\n", b"{}"),
    *(b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n"),
    *(b"Connection: Upgrade\r\nUpgrade: websocket\r\n", b"X: " + b"x" * 20_000 + b"\r\n"),
    *(b"2\r\n{}\r\n", b"0\r\n\r\n", b"ffffffffffffffffff\r\n", b"\n", b" "),
)
FIRST = (
    *(b"", b"GET /health HTTP/1.1\r\nHost: model\r\n"),
    b"POST /v1/completions HTTP/1.1\r\nHost: model\r\nContent-Type: application/json\r\n",
)


def nearly_http(r: Random) -> bytes:
    """Lines of requests in any order, with other bytes in between."""
    lines = (
        r.randbytes(9) if r.random() < 0.1 else r.choice(LINES) for _ in range(r.randrange(12))
    )
    return r.choice(FIRST) + b"".join(lines)


@given(SEEDS)
def test_connections(place: Place, seed: int) -> None:
    """Bytes that are nearly HTTP, in several reads; then the client goes away."""
    config = uvicorn.Config(
        place.stand_in.app, loop="asyncio", ws="none", lifespan="off", log_level="critical"
    )
    config.load()
    r = Random(seed)
    for _ in range(INPUTS):
        sent, wire = nearly_http(r), Wire()
        place.loop.run_until_complete(talk(config, wire, sent, len(sent) // r.randint(1, 4) + 1))
        assert place.problems == [], sent
        assert place.stand_in.is_idle, sent
        if wire.written:  # an answer, or more of them
            line = bytes(wire.written).split(b"\r\n")[0].split(b" ")
            assert line[0] == b"HTTP/1.1" and int(line[1]) in STATUSES | {100}, sent


async def talk(config: uvicorn.Config, wire: Wire, sent: bytes, size: int) -> None:
    """Gives what is sent to a connection, in parts of a size."""
    state = ServerState()
    connection = Connection(
        most=4,
        config=config,
        server_state=state,
        app_state={},
        _loop=asyncio.get_running_loop(),
    )
    connection.connection_made(wire)
    for at in range(0, len(sent), size):
        if not wire.closed:
            connection.data_received(sent[at : at + size])
            await asyncio.sleep(0)
    connection.connection_lost(None)
    if state.tasks:
        await asyncio.wait(state.tasks, timeout=60)
    assert not state.tasks and not state.connections
