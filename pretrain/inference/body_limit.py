"""ASGI middleware: reads the whole body of a request, refuses one that is too large, counts requests."""

from collections.abc import MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from pretrain.inference.metrics import Metrics

ASGI = Any  # an ASGI application, or its `receive` and `send`


class BodyLimit:
    """Passes requests on to `app` if their body has at most `max_bytes` bytes; refuses others with 413.

    Args:
        app: the application.
        max_bytes: the most bytes of a request's body; no more of it is kept in memory.
        metrics: where requests are counted.
        paths: requests are counted for each of these paths; all other paths are counted as "other".
    """

    def __init__(self, app: ASGI, max_bytes: int, metrics: Metrics, paths: tuple[str, ...]) -> None:
        self._app, self._max_bytes, self._metrics, self._paths = app, max_bytes, metrics, paths

    async def __call__(self, scope: dict[str, Any], receive: ASGI, send: ASGI) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        body = await self._read(receive)
        if body is None:
            text = f"the body is larger than {self._max_bytes:,} bytes (--max-body-bytes)"
            content = {"error": {"message": text, "type": "invalid_request_error", "code": None}}
            # The rest of the body is not read, so the connection must be closed after the answer.
            response = JSONResponse(content, 413, headers={"Connection": "close"})
            await response(scope, receive, counted)
            return
        given = False

        async def replay() -> dict[str, Any]:
            nonlocal given
            if given:
                return await receive()  # the next message says that the client has disconnected
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, counted)

    async def _read(self, receive: ASGI) -> bytes | None:
        """The whole body; None: it is too large."""
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                return None
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                return body
