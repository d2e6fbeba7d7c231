"""The HTTP side of `serve`: OpenAI's completions and chat completions, health, metrics."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from megatron_ladder.errors import UserError
from pretrain.inference.server.answers import Answers, Served
from pretrain.inference.server.body_limit import BodyLimit
from pretrain.inference.server.errors import error
from pretrain.inference.server.frontdesk import Busy, Closing, FrontDesk
from pretrain.inference.server.metrics import Metrics

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")


def make_app(
    served: Served,
    desk: FrontDesk,
    metrics: Metrics,
    max_body_bytes: int,
    allow_origins: Sequence[str] = (),
) -> Any:
    """The application, to run in any ASGI server.

    Args:
        served: the model.
        desk: takes the requests.
        metrics: what /metrics shows.
        max_body_bytes: larger request bodies are refused (413).
        allow_origins: origins of web pages whose scripts may send requests; "*": all.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    answers = Answers(served, desk)
    model = {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "megatron-ladder",
        "max_model_len": served.context_length,
    }

    @app.exception_handler(UserError)
    async def _(_: Request, problem: UserError) -> Response:
        return error(400, str(problem))

    @app.exception_handler(Busy)
    async def _(_: Request, __: Busy) -> Response:
        return error(
            429, "too many requests are running and waiting: try again", **{"Retry-After": "1"}
        )

    @app.exception_handler(Closing)
    async def _(_: Request, __: Closing) -> Response:
        return error(503, "the server is being stopped", **{"Retry-After": "10"})

    @app.exception_handler(HTTPException)
    async def _(_: Request, problem: HTTPException) -> Response:
        return error(problem.status_code, str(problem.detail))

    @app.exception_handler(Exception)
    async def _(_: Request, __: Exception) -> Response:  # uvicorn logs it
        return error(500, "the server has failed: its log says how")

    @app.get("/health")
    async def _() -> Response:
        return (
            error(503, "the server is being stopped")
            if desk.is_closing
            else JSONResponse({"status": "ok"})
        )

    @app.get("/metrics")
    async def _() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def _() -> Any:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def _(name: str) -> Any:
        answers.check_name(name)
        return model

    @app.post("/v1/completions")
    async def _(request: Request) -> Response:
        return await answers.completion(request)

    @app.post("/v1/chat/completions")
    async def _(request: Request) -> Response:
        return await answers.chat(request)

    limited = BodyLimit(app, max_body_bytes, metrics, PATHS)
    if not allow_origins:
        return limited
    # Outside: a page may read refusals too.
    return CORSMiddleware(
        limited, allow_origins=allow_origins, allow_methods=["*"], allow_headers=["*"]
    )
