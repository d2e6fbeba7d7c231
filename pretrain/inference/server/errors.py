"""OpenAI's form of an error, for all that is refused."""

from typing import Any

from starlette.responses import JSONResponse

MOST_CHARACTERS = 1000
"""Of a message. It may repeat what the client has sent, which may be long."""


def error_content(status: int, message: str) -> dict[str, Any]:
    """The body of an answer that is an error.

    Args:
        status: the HTTP status.
        message: a sentence; it is cut after MOST_CHARACTERS.
    """
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    if len(message) > MOST_CHARACTERS:
        message = message[:MOST_CHARACTERS] + " ..."
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def error(status: int, message: str, **headers: str) -> JSONResponse:
    """The answer that says that a request is refused, or has failed."""
    return JSONResponse(error_content(status, message), status, headers=headers or None)
