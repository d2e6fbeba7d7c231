"""The HTTP side of `serve`: OpenAI's completions and chat completions, health, metrics."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from tokenizers import Tokenizer

from megatron_ladder.errors import UserError
from megatron_ladder.inference.engine import Sampling
from pretrain.inference.body_limit import BodyLimit
from pretrain.inference.chat import Render
from pretrain.inference.frontdesk import Busy, Closing, FrontDesk
from pretrain.inference.metrics import Metrics
from pretrain.inference.protocol import ChatRequest, CompletionRequest
from pretrain.inference.text import TextStream

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for completions. A chat may go on to the end of the context."""


@dataclass(frozen=True)
class Served:
    """What a request needs to know about the model."""

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    context_length: int
    render: Render
    created: int


@dataclass(frozen=True)
class Piece:
    """The next part of a choice. (OpenAI calls each continuation in an answer a choice.)"""

    index: int
    text: str
    ids: tuple[int, ...]
    finish_reason: str | None


def make_app(served: Served, desk: FrontDesk, metrics: Metrics, max_body_bytes: int) -> Any:
    """The application, to run in any ASGI server.

    Args:
        served: the model.
        desk: takes the requests.
        metrics: what /metrics shows.
        max_body_bytes: larger request bodies are refused (413).
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    answers = _Answers(served, desk)

    def error(status: int, message: str, **headers: str) -> Response:
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        content = {"error": {"message": message, "type": kind, "param": None, "code": None}}
        return JSONResponse(content, status, headers=headers or None)

    @app.exception_handler(UserError)
    async def _(_: Request, problem: UserError) -> Response:
        return error(400, str(problem))

    @app.exception_handler(RequestValidationError)
    async def _(_: Request, problem: RequestValidationError) -> Response:
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return error(400, f"{where}: {first['msg']}" if where else f"{first['msg']}")

    @app.exception_handler(Busy)
    async def _(_: Request, __: Busy) -> Response:
        return error(
            429, "too many requests are running and waiting: try again", **{"Retry-After": "1"}
        )

    @app.exception_handler(Closing)
    async def _(_: Request, __: Closing) -> Response:
        return error(503, "the server is being stopped", **{"Retry-After": "10"})

    @app.exception_handler(StarletteHTTPException)
    async def _(_: Request, problem: StarletteHTTPException) -> Response:
        return error(problem.status_code, str(problem.detail))

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
        facts = {"id": served.name, "object": "model", "created": served.created}
        return {"object": "list", "data": [{**facts, "owned_by": "megatron-ladder"}]}

    @app.post("/v1/completions")
    async def _(body: CompletionRequest, request: Request) -> Response:
        return await answers.completion(body, request)

    @app.post("/v1/chat/completions")
    async def _(body: ChatRequest, request: Request) -> Response:
        return await answers.chat(body, request)

    return BodyLimit(app, max_body_bytes, metrics, PATHS)


class _Answers:
    """Answers requests for completions and chat completions."""

    def __init__(self, served: Served, desk: FrontDesk) -> None:
        self._served, self._desk = served, desk

    async def completion(self, body: CompletionRequest, request: Request) -> Response:
        self._check(body)
        texts = body.prompts()
        if not texts:
            raise UserError("prompt is empty: give at least one prompt")
        prompts = [self._ids(text) for text in texts]
        sampling = body.sampling(body.max_tokens or DEFAULT_MAX_TOKENS)
        echoed = [t if isinstance(t, str) else self._served.tokenizer.decode(t) for t in texts]
        n = body.n or 1
        before = [text if body.echo else "" for text in echoed for _ in range(n)]

        def choice(piece: Piece, *, is_whole: bool, is_first: bool) -> dict[str, Any]:
            text = (before[piece.index] if is_first else "") + piece.text
            facts = {"index": piece.index, "text": text, "logprobs": None}
            return {**facts, "finish_reason": piece.finish_reason}

        return await self._answer(
            *(request, body, prompts, sampling, "cmpl", "text_completion", choice)
        )

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        self._check(body)
        prompt = self._ids(self._served.render([message.plain() for message in body.messages]))
        most = body.max_completion_tokens or body.max_tokens
        left = max(1, self._served.context_length - len(prompt))
        sampling = body.sampling(most or left)

        def choice(piece: Piece, *, is_whole: bool, is_first: bool) -> dict[str, Any]:
            said: dict[str, Any] = {"content": piece.text}
            if is_whole or is_first:
                said = {"role": "assistant", **said}
            facts = {"index": piece.index, "finish_reason": piece.finish_reason, "logprobs": None}
            return {**facts, "message" if is_whole else "delta": said}

        return await self._answer(
            *(request, body, [prompt], sampling, "chatcmpl", "chat.completion", choice)
        )

    def _check(self, body: CompletionRequest | ChatRequest) -> None:
        if body.model != self._served.name:
            raise HTTPException(404, f"no model {body.model!r}: {self._served.name!r} is served")
        body.refuse_unsupported()

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._served.tokenizer.encode(prompt, add_special_tokens=False).ids
        if wrong := [i for i in prompt if not 0 <= i < self._served.vocab_size]:
            raise UserError(
                f"prompt contains token id {wrong[0]}: ids go from 0 to {self._served.vocab_size - 1}"
            )
        return prompt

    async def _answer(
        self,
        request: Request,
        body: CompletionRequest | ChatRequest,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        prefix: str,
        kind: str,
        choice: Any,
    ) -> Response:
        """The whole answer in one response, or as server-sent events where `body.stream` is set.

        Args:
            prefix: of the answer's id: "cmpl" or "chatcmpl".
            kind: the answer's `object`.
            choice: makes a choice of OpenAI's format from a Piece.
        """
        n = body.n or 1
        choices = [prompt for prompt in prompts for _ in range(n)]
        facts = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
        facts["model"] = self._served.name
        prompt_tokens = sum(map(len, prompts))
        admitted = self._desk.admit(choices, sampling)
        pieces = self._pieces(admitted, choices, body.stops())
        if body.stream:
            facts["object"] = "chat.completion.chunk" if prefix == "chatcmpl" else kind
            include = body.stream_options is not None and body.stream_options.include_usage
            events = _events(pieces, facts, choice, prompt_tokens if include else None)
            return _Events(events, lambda: self._desk.release(admitted))
        ids: list[list[int]] = [[] for _ in choices]
        reasons: list[str | None] = [None for _ in choices]
        try:
            async with aclosing(_while_connected(request, pieces)) as connected:
                async for piece in connected:
                    ids[piece.index] += piece.ids
                    reasons[piece.index] = piece.finish_reason
        finally:
            self._desk.release(admitted)
        whole = []
        for i, prompt in enumerate(choices):
            # All tokens are decoded together: an incomplete character may change the text before it.
            stream = TextStream(self._served.tokenizer, prompt, body.stops())
            whole.append(Piece(i, stream.push(ids[i], is_last=True), (), reasons[i]))
        listed = [choice(piece, is_whole=True, is_first=True) for piece in whole]
        usage = _usage(prompt_tokens, sum(map(len, ids)))
        return JSONResponse({**facts, "object": kind, "choices": listed, "usage": usage})

    async def _pieces(
        self, admitted: Sequence[int], choices: Sequence[list[int]], stop: list[str]
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of all choices, in the order in which they are generated."""
        ready: asyncio.Queue[Piece | None] = asyncio.Queue()

        async def one(index: int, prompt: list[int]) -> None:
            try:
                async with aclosing(self._choice(admitted[index], index, prompt, stop)) as mine:
                    async for piece in mine:
                        ready.put_nowait(piece)
            finally:
                ready.put_nowait(None)

        tasks = [asyncio.create_task(one(i, prompt)) for i, prompt in enumerate(choices)]
        left = len(tasks)
        try:
            while left:
                piece = await ready.get()
                if piece is None:
                    left -= 1
                else:
                    yield piece
            for task in tasks:
                task.result()  # raises the task's exception, if it had one
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _choice(
        self, request_id: int, index: int, prompt: list[int], stop: list[str]
    ) -> AsyncGenerator[Piece, None]:
        stream = TextStream(self._served.tokenizer, prompt, stop)
        async with aclosing(self._desk.outputs(request_id)) as outputs:
            async for output in outputs:
                text = stream.push(output.new_ids, is_last=output.finish_reason is not None)
                reason = "stop" if stream.stopped else output.finish_reason
                if stream.stopped:
                    # At once, not when the answer is complete: other choices may go on for long.
                    self._desk.release([request_id])
                if text or reason or output.new_ids:
                    yield Piece(index, text, output.new_ids, reason)
                if stream.stopped:
                    return


class _Events(StreamingResponse):
    """Server-sent events. `ended` is called at the end, even if the client disconnects before the first."""

    def __init__(self, events: AsyncGenerator[bytes, None], ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


async def _while_connected(
    request: Request, pieces: AsyncGenerator[Piece, None]
) -> AsyncGenerator[Piece, None]:
    """Passes `pieces` on, and ends them when the client disconnects, since nobody would read the answer."""
    gone = asyncio.create_task(_disconnected(request))
    try:
        while True:
            following = asyncio.ensure_future(anext(pieces, None))
            await asyncio.wait([following, gone], return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
                raise HTTPException(499, "the client has disconnected")
            if (piece := following.result()) is None:
                return
            yield piece
    finally:
        gone.cancel()
        await pieces.aclose()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    pieces: AsyncGenerator[Piece, None],
    facts: dict[str, Any],
    choice: Any,
    prompt_tokens: int | None,
) -> AsyncGenerator[bytes, None]:
    seen: set[int] = set()
    tokens = 0
    async with aclosing(pieces) as open_pieces:
        async for piece in open_pieces:
            tokens += len(piece.ids)
            listed = [choice(piece, is_whole=False, is_first=piece.index not in seen)]
            seen.add(piece.index)
            if piece.text or piece.finish_reason or listed[0].get("text"):
                yield _event({**facts, "choices": listed})
    if prompt_tokens is not None:
        yield _event({**facts, "choices": [], "usage": _usage(prompt_tokens, tokens)})
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


def _usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }
