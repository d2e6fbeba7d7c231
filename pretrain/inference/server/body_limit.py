"""ASGI middleware: reads the whole body of a request, within limits of size and time; counts requests."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

from pretrain.inference.server.errors import error
from pretrain.inference.server.metrics import Metrics

ASGI = Any  # an ASGI application, or its `receive` and `send`

BODY_S = 60.0
"""Seconds from a request's headers to the end of its body."""
MOST_BODIES = 64
"""The bodies of all requests together have at most as many bytes as so many of the largest."""


class _Refused(Exception):
    """The body is not read further: the status, and why."""


class BodyLimit:
    """Passes requests on to `app` with their whole body, or refuses them.

    A body with more than `max_bytes` bytes gets 413, one that does not end within BODY_S seconds 408, and
    one for which the bodies of all other requests leave no room 429.

    Args:
        app: the application.
        max_bytes: the most bytes of a request's body; no more of it is kept in memory.
        metrics: where requests are counted.
        paths: requests are counted for each of these paths; all other paths are counted as "other".
    """

    def __init__(self, app: ASGI, max_bytes: int, metrics: Metrics, paths: tuple[str, ...]) -> None:
        self._app, self._max_bytes, self._metrics, self._paths = app, max_bytes, metrics, paths
        self._kept = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: ASGI, send: ASGI) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            body = await self._whole(_announced(scope), receive)
        except _Refused as refused:
            status, why = refused.args
            more = {"Retry-After": "1"} if status == 429 else {}
            # The rest of the body is not read, so the connection must be closed after the answer.
            response = error(status, why, Connection="close", **more)
            await response(scope, receive, counted)
            return
        if body is None:
            return  # the client has gone
        size = len(body)
        replay = _replaying(body, receive)
        del body  # `replay` forgets it when it has given it
        try:
            await self._app(scope, replay, counted)
        finally:
            self._kept -= size

    async def _whole(self, announced: int, receive: ASGI) -> bytes | None:
        """The body, whose bytes are added to `self._kept`; None: the client has gone."""
        self._refuse_large(announced)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        self._kept -= len(body)
                        return None
                    self._append(body, message.get("body", b""))
                    if not message.get("more_body"):
                        return bytes(body)
        except BaseException as problem:
            self._kept -= len(body)
            if isinstance(problem, TimeoutError):
                why = f"the body has not ended within {BODY_S:.0f} seconds"
                raise _Refused(408, why) from problem
            raise

    def _append(self, body: bytearray, part: bytes) -> None:
        self._refuse_large(len(body) + len(part))
        if self._kept + len(part) > MOST_BODIES * self._max_bytes:
            raise _Refused(429, "the bodies of other requests leave no room: try again")
        body += part
        self._kept += len(part)

    def _refuse_large(self, size: int) -> None:
        if size > self._max_bytes:
            raise _Refused(
                413, f"the body is larger than {self._max_bytes:,} bytes (--max-body-bytes)"
            )


def _announced(scope: MutableMapping[str, Any]) -> int:
    """What the header says about the body's size; 0: nothing."""
    said = dict(scope["headers"]).get(b"content-length", b"")
    return int(said) if said.isdigit() and len(said) < 20 else 0


def _replaying(body: bytes, receive: ASGI) -> ASGI:
    """A `receive` that gives the body once, and then what comes after it: that the client has gone."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> dict[str, Any]:
        return messages.pop() if messages else await receive()

    return replay
