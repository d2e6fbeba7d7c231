"""Answers to requests for completions and chat completions: whole, or as server-sent events."""

import asyncio
import functools
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from megatron_ladder.errors import UserError
from megatron_ladder.inference.requests import Sampling
from pretrain.convert.model_text import ModelText
from pretrain.inference.server.chat import Render
from pretrain.inference.server.frontdesk import Busy, Closing, FrontDesk
from pretrain.inference.server.prompts import encode
from pretrain.inference.server.protocol import Asked, ChatRequest, CompletionRequest, parse
from pretrain.inference.text import TextStream

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for completions. A chat may go on to the end of the context."""
THREADS = 2
"""They parse bodies and encode prompts. Each holds what one body becomes, so there are few."""

T = TypeVar("T")


@dataclass(frozen=True)
class Served:
    """What a request needs to know about the model."""

    name: str
    text: ModelText
    special_ids: dict[str, int]
    """Of the tokens that no text shows."""
    context_length: int
    """The most tokens of a prompt and its answer: the model's context, or what the cache holds if that is
    less."""
    render: Render
    created: int


@dataclass(frozen=True)
class Piece:
    """The next part of a choice. (OpenAI calls each continuation in an answer a choice.)"""

    index: int
    text: str
    ids: tuple[int, ...]
    finish_reason: str | None


class Answers:
    """Answers requests for completions and chat completions."""

    def __init__(self, served: Served, desk: FrontDesk) -> None:
        self._served, self._desk = served, desk
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="prompts")

    async def completion(self, request: Request) -> Response:
        body = await self._parsed(CompletionRequest, request)
        texts = body.prompts()
        if not texts:
            raise UserError("prompt is empty: give at least one prompt")
        n = body.n or 1
        sampling = body.sampling(body.max_tokens or DEFAULT_MAX_TOKENS, self._stop_ids(body))
        # Before anything is encoded: few of many prompts may have a place.
        held = self._desk.hold(len(texts) * n)
        try:
            prompts, before = await self._in_thread(self._encode, texts, sampling, bool(body.echo))
        except BaseException:
            self._desk.release(held)
            raise
        del texts

        def choice(piece: Piece, *, is_whole: bool, is_first: bool) -> dict[str, Any]:
            text = (before[piece.index // n] if body.echo and is_first else "") + piece.text
            facts = {"index": piece.index, "text": text, "logprobs": None}
            return {**facts, "finish_reason": piece.finish_reason}

        return await self._answer(
            *(request, body, held, prompts, sampling, "cmpl", "text_completion", choice)
        )

    async def chat(self, request: Request) -> Response:
        body = await self._parsed(ChatRequest, request)
        held = self._desk.hold(body.n or 1)
        try:
            messages = [message.plain() for message in body.messages]
            more = body.chat_template_kwargs or {}
            text = await self._served.render(messages, more)
            del messages, more
            prompt = await self._in_thread(self._ids, text, is_rendered=True)
            most = body.max_completion_tokens or body.max_tokens
            left = max(1, self._served.context_length - len(prompt))
            sampling = body.sampling(most or left, self._stop_ids(body))
            await self._in_thread(self._desk.check, prompt, sampling)
        except BaseException:
            self._desk.release(held)
            raise

        def choice(piece: Piece, *, is_whole: bool, is_first: bool) -> dict[str, Any]:
            said: dict[str, Any] = {"content": piece.text}
            if is_whole or is_first:
                said = {"role": "assistant", **said}
            facts = {"index": piece.index, "finish_reason": piece.finish_reason, "logprobs": None}
            return {**facts, "message" if is_whole else "delta": said}

        return await self._answer(
            *(request, body, held, [prompt], sampling, "chatcmpl", "chat.completion", choice)
        )

    async def _parsed(self, kind: type[Asked], request: Request) -> Asked:
        """The request, if there is a place for at least one prompt."""
        if self._desk.is_closing:
            raise Closing
        if self._desk.is_full:
            raise Busy
        said = request.headers.get("content-type", "")
        if said.partition(";")[0].strip().lower() != "application/json":
            # Pages of other origins may send other types without asking first.
            raise UserError("the body is no JSON: send Content-Type: application/json")
        whole = b"".join([part async for part in request.stream()])
        body = await self._in_thread(parse, kind, whole)
        self.check_name(body.model)
        return body

    async def _in_thread(self, work: Callable[..., T], *given: Any, **named: Any) -> T:
        """So that the event loop can answer others meanwhile."""
        call = functools.partial(work, *given, **named)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def check_name(self, name: str) -> None:
        if name != self._served.name:
            raise HTTPException(404, f"no model {name[:200]!r}: {self._served.name!r} is served")

    def _encode(
        self, texts: list[str] | list[list[int]], sampling: Sampling, is_echoed: bool
    ) -> tuple[list[list[int]], list[str]]:
        """The ids of all prompts; and their texts, if they are `echo`ed."""
        prompts = []
        for text in texts:
            prompts.append(self._ids(text))
            self._desk.check(prompts[-1], sampling)
        decode = self._served.text.tokenizer.decode
        echoed = [text if isinstance(text, str) else decode(text) for text in texts if is_echoed]
        return prompts, echoed

    def _ids(self, prompt: str | list[int], *, is_rendered: bool = False) -> list[int]:
        if isinstance(prompt, str):
            most = self._served.context_length
            return encode(self._served.text, prompt, most, is_rendered=is_rendered)
        return prompt

    def _stop_ids(self, body: CompletionRequest | ChatRequest) -> tuple[int, ...]:
        """Of stop texts that are one special token: such a token has no text to look for."""
        special = self._served.special_ids
        return tuple(special[text] for text in body.stops() if text in special)

    async def _answer(
        self,
        request: Request,
        body: CompletionRequest | ChatRequest,
        held: Sequence[int],
        prompts: Sequence[list[int]],
        sampling: Sampling,
        prefix: str,
        kind: str,
        choice: Any,
    ) -> Response:
        """The whole answer in one response, or as server-sent events where `body.stream` is set.

        Args:
            held: the desk's places, one for each of `body.n` choices of each prompt.
            prefix: of the answer's id: "cmpl" or "chatcmpl".
            kind: the answer's `object`.
            choice: makes a choice of OpenAI's format from a Piece.
        """
        n = body.n or 1
        choices = [prompt for prompt in prompts for _ in range(n)]
        facts = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
        facts["model"] = self._served.name
        prompt_tokens = sum(map(len, prompts))
        self._desk.start(held, choices, sampling)
        pieces = self._pieces(held, choices, body.stops())
        if body.stream:
            facts["object"] = "chat.completion.chunk" if prefix == "chatcmpl" else kind
            include = body.stream_options is not None and body.stream_options.include_usage
            events = _events(pieces, facts, choice, prompt_tokens if include else None)
            return _Events(events, lambda: self._desk.release(held))
        ids: list[list[int]] = [[] for _ in choices]
        reasons: list[str | None] = [None for _ in choices]
        try:
            async with aclosing(_while_connected(request, pieces)) as connected:
                async for piece in connected:
                    ids[piece.index] += piece.ids
                    reasons[piece.index] = piece.finish_reason
        finally:
            self._desk.release(held)
        whole = []
        for i, prompt in enumerate(choices):
            # All tokens are decoded together: an incomplete character may change the text before it.
            stream = TextStream(self._served.text.tokenizer, prompt, body.stops())
            whole.append(Piece(i, stream.push(ids[i], is_last=True), (), reasons[i]))
        listed = [choice(piece, is_whole=True, is_first=True) for piece in whole]
        usage = _usage(prompt_tokens, sum(map(len, ids)))
        return JSONResponse({**facts, "object": kind, "choices": listed, "usage": usage})

    async def _pieces(
        self, held: Sequence[int], choices: Sequence[list[int]], stop: list[str]
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of all choices, in the order in which they are generated."""
        ready: asyncio.Queue[Piece | None] = asyncio.Queue()

        async def one(index: int, prompt: list[int]) -> None:
            try:
                async with aclosing(self._choice(held[index], index, prompt, stop)) as mine:
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
        stream = TextStream(self._served.text.tokenizer, prompt, stop)
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
    following: asyncio.Future[Piece | None] | None = None
    try:
        while True:
            following = asyncio.ensure_future(anext(pieces, None))
            await asyncio.wait([following, gone], return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                raise HTTPException(499, "the client has disconnected")
            if (piece := following.result()) is None:
                return
            yield piece
    finally:
        gone.cancel()
        if following is not None:  # a generator that runs cannot be closed
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
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
            if piece.text or piece.finish_reason or listed[0].get("text"):
                seen.add(piece.index)  # the first that is sent has the role, or the echoed prompt
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
