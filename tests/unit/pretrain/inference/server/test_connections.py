"""Clients that send nothing, or half of a request, or do not read: over sockets, through uvicorn."""

import contextlib
import functools
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from pretrain.inference.server import connections
from pretrain.inference.server.connections import Connection, most_connections
from tests.unit.pretrain.inference.server.stand_in import StandIn

MOST = 4
REQUEST = b"GET /health HTTP/1.1\r\nHost: model\r\n\r\n"
UNFINISHED = b"POST /v1/completions HTTP/1.1\r\nHost: model\r\nContent-Length: 9\r\n\r\n{"
SOON = 0.1


@contextlib.contextmanager
def served(app: Any) -> Iterator[Any]:
    """A function that connects to a server of this application."""
    config = uvicorn.Config(
        app,
        http=functools.partial(Connection, most=MOST),  # type: ignore[arg-type]
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_level="error",
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        opened: list[socket.socket] = []

        def connect(sent: bytes = b"") -> socket.socket:
            opened.append(socket.create_connection(listening.getsockname(), timeout=60))
            opened[-1].sendall(sent)
            return opened[-1]

        try:
            yield connect
        finally:
            for connection in opened:
                connection.close()
            server.should_exit = True
            thread.join(60)
    assert not thread.is_alive()


def answer(connection: socket.socket) -> tuple[int, Any]:
    """The status and the content of an answer that has a length; 0 where the connection ends."""
    file = connection.makefile("rb")
    first = file.readline()
    if not first:
        return 0, None
    length = 0
    while line := file.readline().strip():
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    return int(first.split()[1]), json.loads(file.read(length))


def rest(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            received += part
    return received


@pytest.mark.parametrize("sent", [b"", b"G", b"GET /health HTTP/1.1\r\nHost: model\r\n"])
def test_headers_that_do_not_end(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADERS_S", SOON)
    with served(StandIn().app) as connect:
        connection = connect(sent)
        status, said = answer(connection)
        assert status == 408 and "headers have not ended" in said["error"]["message"]
        assert rest(connection) == b""
        # Those of a second request too; the first one is answered.
        connection = connect(REQUEST)
        assert answer(connection)[0] == 200
        connection.sendall(b"GET ")
        assert answer(connection)[0] == 408
        assert rest(connection) == b""


def test_a_request_that_is_not_http() -> None:
    with served(StandIn().app) as connect:
        for sent in (b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n" * 2):
            connection = connect(sent)
            status, said = answer(connection)
            assert status == 400 and said["error"]["message"]
            rest(connection)
        long = connect(b"GET / HTTP/1.1\r\nHost: model\r\nX: " + b"x" * 70_000 + b"\r\n\r\n")
        assert b" 400 " in rest(long).split(b"\r\n")[0] + b" 400 "  # or reset: it has more to send


def test_clients_that_send_nothing_do_not_keep_others_out() -> None:
    with served(StandIn().app) as connect:
        silent = [connect(sent) for sent in (b"", b"GET ", UNFINISHED, UNFINISHED)]
        for _ in range(6):
            connection = connect(REQUEST)
            assert answer(connection)[0] == 200
            connection.close()
        for connection in silent[:1]:
            assert b" 503 " in rest(connection)
        assert len(silent) == MOST


def test_a_request_that_is_being_answered_is_not_put_out() -> None:
    stand_in = StandIn()
    stand_in.inbox.is_stuck = True
    body = json.dumps({"model": "model", "prompt": "a", "stream": True}).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: model\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    with served(stand_in.app) as connect:
        answered = [connect(head + body) for _ in range(MOST)]
        for connection in answered:
            assert connection.recv(12) == b"HTTP/1.1 200"
        # All connections are in use: a newer one is refused in a sentence.
        status, said = answer(connect(REQUEST))
        assert status == 503 and "too many connections" in said["error"]["message"]
        answered[0].close()


def test_a_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does not take is not kept for it for ever, and the application is told."""
    monkeypatch.setattr(connections, "UNREAD_S", SOON)
    is_told = threading.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        message = {"type": "http.response.body", "body": b"x" * (1 << 20), "more_body": True}
        for _ in range(1000):
            await send(message)
        if (await receive())["type"] == "http.disconnect":
            is_told.set()

    with served(endless) as connect:
        connection = connect(REQUEST)
        assert is_told.wait(60)
        assert len(rest(connection)) < 100 << 20


def test_the_limit_follows_the_places_and_the_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = (1024, 4096)

    def set_limits(_: int, new: tuple[int, int]) -> None:
        nonlocal limits
        limits = new

    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(connections.resource, "setrlimit", set_limits)
    assert (most_connections(72), limits) == (400, (1024, 4096))
    assert (most_connections(1000), limits) == (2256, (2512, 4096))
    assert (most_connections(10_000), limits) == (3840, (4096, 4096))
