"""The server's connections: deadlines for headers and for clients that do not read, and a limit.

uvicorn's own limit (`limit_concurrency`) would refuse /health too, and uvicorn has no deadline for headers.
Deadlines for bodies are in `body_limit`.
"""

import asyncio
import resource
from typing import Any

import orjson
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from pretrain.inference.server.errors import error_content

HEADERS_S = 10.0
"""Seconds from a connection's start, or from the first byte of a later request, to the headers' end."""
UNREAD_S = 30.0
"""Seconds in which a client must read what waits to be sent."""
READ_BYTES = 1 << 14
"""Of one read. All that is read at once is looked at in one go, and a body may come in chunks of a byte."""
OTHER_FILES = 256
"""Descriptors that are not connections."""


def most_connections(requests: int) -> int:
    """How many connections are kept at a time; raises the process's limit of open files where it must.

    Args:
        requests: how many may run and wait.
    """
    wanted = 256 + 2 * requests  # most clients keep connections open that they do not use
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = max(soft, wanted + OTHER_FILES)
    if soft < wanted + OTHER_FILES:
        soft = min(hard, wanted + OTHER_FILES)
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        )
    return max(16, min(wanted, soft - OTHER_FILES))


class Connection(H11Protocol):
    """uvicorn's, with deadlines and a limit.

    At the limit, the connection is closed that has waited longest for a request, or for the rest of one:
    clients that send nothing cannot keep others out.

    Args:
        most: the most connections of all clients.
        others: uvicorn's arguments.
    """

    def __init__(self, *, most: int, **others: Any) -> None:
        super().__init__(**others)
        self._most = most
        self._since = 0.0
        self._headers_end: asyncio.TimerHandle | None = None
        self._unread_end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]
        # Then `pause_writing` is called whenever something waits that the kernel does not take.
        transport.set_write_buffer_limits(high=0)
        super().connection_made(transport)
        self._since = self.loop.time()
        if len(self.connections) > self._most:
            self._make_room()
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._headers_end, self._unread_end):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread_end is None:
            self._unread_end = self.loop.call_later(UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread_end is not None:
            self._unread_end.cancel()
            self._unread_end = None

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    @property
    def _is_between(self) -> bool:
        """Whether no request has begun, or the last one is answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def _is_waiting(self) -> bool:
        """Whether nothing is done for this client: it has yet to send a request, or the rest of one."""
        return self._is_between or (self.cycle.more_body and not self.cycle.response_started)

    def _watch_headers(self) -> None:
        if not self._is_between:
            if self._headers_end is not None:
                self._headers_end.cancel()
                self._headers_end = None
        elif self._headers_end is None:
            self._headers_end = self.loop.call_later(HEADERS_S, self._headers_are_late)

    def _headers_are_late(self) -> None:
        self._headers_end = None
        if self._is_between:
            self._refuse(408, f"the headers have not ended within {HEADERS_S:.0f} seconds")

    def _make_room(self) -> None:
        waiting = [other for other in self.connections if other._is_waiting]  # type: ignore[union-attr]
        oldest = min(waiting, key=lambda other: other._since)  # type: ignore[union-attr]
        oldest._refuse(503, "there are too many connections: try again")  # type: ignore[union-attr]

    def _refuse(self, status: int, why: str) -> None:
        """Answers, where no answer has begun, and closes the connection."""
        self.connections.discard(self)
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            content = orjson.dumps(error_content(status, why))
            head = (
                f"HTTP/1.1 {status} ".encode()
                + STATUS_PHRASES[status]
                + f"\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
                "Connection: close\r\n\r\n".encode()
            )
            self.transport.write(head + content)
            if self.cycle is not None:
                self.cycle.disconnected = True  # the application's own answer is not sent
        self.transport.close()
