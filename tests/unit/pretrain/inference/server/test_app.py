"""What requests may cost `serve` before they are refused: nothing is encoded in vain, or in the loop."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from tokenizers import AddedToken

from megatron_ladder.errors import UserError
from megatron_ladder.inference.requests import Request
from pretrain.convert.model_text import ModelText
from pretrain.inference.engine_loop import Cancel
from pretrain.inference.server import body_limit
from pretrain.inference.server.prompts import PIECE, encode
from pretrain.inference.server.protocol import ChatRequest, CompletionRequest
from tests.chat_models import tokenizer_json
from tests.unit.pretrain.inference.server.stand_in import (
    CONTEXT,
    MOST_BODY_BYTES,
    MOST_RUNNING,
    MOST_WAITING,
    StandIn,
)

BODY = {"model": "model", "prompt": "quick brown", "max_tokens": 4}
JSON = {"Content-Type": "application/json"}
MOST = MOST_RUNNING + MOST_WAITING


class Watched:
    """A tokenizer that counts its calls and their characters; each waits until `go` is set."""

    def __init__(self) -> None:
        self._theirs: Any = tokenizer_json()
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()
        self.texts: list[str] = []

    def encode(self, text: str, **how: Any) -> Any:
        return self._seen([text], self._theirs.encode, text, **how)

    def encode_batch_fast(self, texts: list[str], **how: Any) -> Any:
        return self._seen(texts, self._theirs.encode_batch_fast, texts, **how)

    def _seen(self, texts: list[str], work: Any, *given: Any, **how: Any) -> Any:
        self.texts += texts
        self.begun.set()
        assert self.go.wait(60)
        return work(*given, **how)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)


def said(answer: httpx.Response) -> str:
    """The sentence of an error, which is in OpenAI's form."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 1100
    return error["message"]


def test_others_are_answered_while_a_prompt_is_encoded() -> None:
    async def talk() -> None:
        tokenizer = Watched()
        stand_in = StandIn(tokenizer)
        tokenizer.go.clear()
        async with stand_in.client() as client:
            posted = asyncio.create_task(client.post("/v1/completions", json=BODY))
            await asyncio.to_thread(tokenizer.begun.wait, 60)
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/metrics")).status_code == 200
            assert (await client.get("/v1/models")).status_code == 200
            assert not posted.done()
            tokenizer.go.set()
            assert (await posted).status_code == 200
        assert stand_in.is_idle

    asyncio.run(talk())


@pytest.mark.parametrize("count", [MOST + 1, 9_000, 200_000])
@pytest.mark.parametrize("n", [1, 16])
def test_too_many_prompts_are_refused_before_any_is_encoded(count: int, n: int) -> None:
    async def talk() -> None:
        tokenizer = Watched()
        stand_in = StandIn(tokenizer)
        for prompt in (["a"] * count, [[1]] * count):
            async with stand_in.client() as client:
                body = {**BODY, "prompt": prompt, "n": n}
                answer = await client.post("/v1/completions", json=body)
            assert answer.status_code in (400, 413) and said(answer)
        assert tokenizer.texts == []
        assert stand_in.is_idle

    asyncio.run(talk())


def test_where_there_is_no_place_nothing_is_encoded() -> None:
    async def talk() -> None:
        tokenizer = Watched()
        stand_in = StandIn(tokenizer)
        held = stand_in.desk.hold(MOST - 1)
        async with stand_in.client() as client:
            for change in ({"n": 2}, {"prompt": ["a", "b"]}):
                answer = await client.post("/v1/completions", json={**BODY, **change})
                assert answer.status_code == 429 and answer.headers["Retry-After"]
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200
            seen = len(tokenizer.texts)
            held += stand_in.desk.hold(1)
            # Not even the body is looked at.
            wrong = await client.post("/v1/completions", content=b"{" * 1000, headers=JSON)
            assert wrong.status_code == 429 and said(wrong)
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/metrics")).status_code == 200
            assert len(tokenizer.texts) == seen
            stand_in.desk.release(held)
            stand_in.desk.close()
            assert (await client.post("/v1/completions", json=BODY)).status_code == 503
        assert stand_in.is_idle

    asyncio.run(talk())


def test_a_text_that_is_much_too_long_is_not_encoded_as_a_whole() -> None:
    async def talk() -> None:
        tokenizer = Watched()
        stand_in = StandIn(tokenizer)
        async with stand_in.client() as client:
            answer = await client.post(
                "/v1/completions", json={**BODY, "prompt": "quick " * 150_000}
            )
            assert answer.status_code == 400
            assert f"exceeds the {CONTEXT} tokens that a request may have" in said(answer)
            # Nor are the prompts after one that is too long.
            several = {**BODY, "prompt": ["quick " * CONTEXT, "never"]}
            assert (await client.post("/v1/completions", json=several)).status_code == 400
        assert max(map(len, tokenizer.texts)) < 100_000
        assert sum(map(len, tokenizer.texts)) < 100_000
        assert "never" not in tokenizer.texts
        assert stand_in.is_idle

    asyncio.run(talk())


def test_a_long_text_of_few_tokens_is_taken() -> None:
    """A special token may swallow the spaces before it: however many, they are no token."""
    tokenizer = tokenizer_json()
    tokenizer.add_special_tokens([AddedToken("<|x|>", special=True, lstrip=True)])
    text = (" " * 200 + "<|x|>") * 400
    whole = tokenizer.encode(text).ids
    assert len(text) > PIECE and len(whole) <= 401
    assert encode(ModelText(tokenizer, ()), text, 512) == whole
    with pytest.raises(UserError, match="exceeds the 128 tokens that a request may"):
        encode(ModelText(tokenizer, ()), text, 128)


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (CompletionRequest, {"prompt": [1] * 50_000 + ["x"]}),
        (CompletionRequest, {"prompt": [[]] * 20_000 + ["x"]}),
        (CompletionRequest, {"prompt": [{}] * 50_000}),
        (CompletionRequest, {"prompt": [["x"]] * 50_000}),
        (CompletionRequest, {"prompt": "a", "stop": [1] * 50_000}),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": ["a"] * 50_000}),
        (ChatRequest, {"messages": [{"role": "x"}] * 50_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 50_000}]}),
    ],
)
def test_a_list_of_mistakes_is_one_mistake(kind: Any, field: dict[str, Any]) -> None:
    """An error for each item of a body of 4 MiB took gigabytes, and most of a minute."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(json.dumps({"model": "model", **field}))
    assert caught.value.error_count() <= 8


@pytest.mark.parametrize(
    "field",
    [
        b'"logit_bias":{' + b",".join(b'"%d":1' % i for i in range(50_000)) + b"}",
        b'"metadata":' + b"[" * 400_000 + b"]" * 400_000,
        b'"metadata":' + b"[" * 300 + b"]" * 300,
        b'"metadata":[' + b"{}," * 200_000 + b"{}]",
        b'"stop":"' + b"x" * 2000 + b'"',
        b'"stop":[' + b'"x",' * 100_000 + b'"x"]',
        b'"max_tokens":' + b"9" * 4000,
        b'"max_tokens":' + b"9" * 100_000,
        b'"max_tokens":1e400',
        b'"min_tokens":' + b"9" * 30,
        b'"temperature":' + b"9" * 400,
        b'"temperature":NaN',
        b'"repetition_penalty":-Infinity',
        b'"top_k":' + b"9" * 30,
        b'"stop_token_ids":[' + b"9" * 4000 + b"]",
        b'"user":"\xff"',
        b'"user":"\\ud800"',
        b'"user":"',
        b'"' + b"f" * 500_000 + b'":1',
    ],
)
def test_odd_fields_are_refused_in_a_sentence(field: bytes) -> None:
    async def talk() -> None:
        stand_in = StandIn()
        async with stand_in.client() as client:
            body = b'{"model":"model","prompt":"a",' + field + b"}"
            answer = await client.post("/v1/completions", content=body, headers=JSON)
            assert answer.status_code == 400, answer.text
            assert said(answer)
            name = {**BODY, "model": "m" * 100_000}
            answer = await client.post("/v1/completions", json=name)
            assert answer.status_code == 404 and said(answer)
        assert stand_in.is_idle

    asyncio.run(talk())


def test_lists_in_a_text_are_not_counted() -> None:
    async def talk() -> None:
        stand_in = StandIn()
        async with stand_in.client() as client:
            text = '[{"\\' * 60_000
            answer = await client.post("/v1/completions", json={**BODY, "prompt": text})
            assert "tokens that a request may have" in said(answer)
            sent = b'{"model":"model","prompt":"' + b'\\"[' * 150_000
            answer = await client.post("/v1/completions", content=sent, headers=JSON)
            assert "Invalid JSON" in said(answer)

    asyncio.run(talk())


def test_a_body_of_another_type_is_refused() -> None:
    """A page of another origin may send text/plain without asking."""

    async def talk() -> None:
        stand_in = StandIn()
        async with stand_in.client() as client:
            for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
                answer = await client.post(
                    "/v1/completions", content=json.dumps(BODY), headers={"Content-Type": kind}
                )
                assert answer.status_code == 400 and "application/json" in said(answer)

    asyncio.run(talk())


def test_a_body_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limit, "BODY_S", 0.05)

    async def endless() -> AsyncIterator[bytes]:
        yield b'{"model":'
        await asyncio.Event().wait()

    async def talk() -> None:
        async with StandIn().client() as client:
            answer = await client.post("/v1/completions", content=endless(), headers=JSON)
        assert answer.status_code == 408 and "has not ended" in said(answer)
        assert answer.headers["Connection"] == "close"

    asyncio.run(talk())


def test_all_bodies_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limit, "MOST_BODIES", 2)

    async def talk() -> None:
        stand_in = StandIn()
        go = asyncio.Event()
        sent = [asyncio.Event() for _ in range(2)]

        async def slow(i: int) -> AsyncIterator[bytes]:
            yield b" " * MOST_BODY_BYTES
            sent[i].set()
            await go.wait()

        async with stand_in.client() as client:
            slower = [
                asyncio.create_task(client.post("/v1/completions", content=slow(i), headers=JSON))
                for i in range(2)
            ]
            for event in sent:
                await event.wait()
            answer = await client.post("/v1/completions", json=BODY)
            assert answer.status_code == 429 and "leave no room" in said(answer)
            assert (await client.get("/health")).status_code == 200
            go.set()
            assert {(await task).status_code for task in slower} == {400}
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200

    asyncio.run(talk())


def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    async def talk() -> None:
        sent: list[Any] = []

        async def receive() -> Any:
            raise AssertionError("the body is read")

        async def send(message: Any) -> None:
            sent.append(message)

        length = str(MOST_BODY_BYTES + 1).encode()
        scope = {
            "type": "http",
            "path": "/v1/completions",
            "headers": [(b"content-length", length)],
        }
        await StandIn().app(scope, receive, send)
        assert sent[0]["status"] == 413

    asyncio.run(talk())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_places(stream: bool) -> None:
    async def talk() -> None:
        stand_in = StandIn()
        stand_in.inbox.is_stuck = True
        gone = asyncio.Event()
        body = json.dumps({**BODY, "n": 3, "stream": stream}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            pass

        headers = [(b"content-type", b"application/json")]
        scope: dict[str, Any] = {"type": "http", "path": "/v1/completions", "method": "POST"}
        scope |= {"headers": headers, "query_string": b"", "asgi": {"spec_version": "2.3"}}
        answering = asyncio.create_task(stand_in.app(scope, receive, send))
        while len(stand_in.inbox.sent) < 3:
            await asyncio.sleep(0)
        gone.set()
        await answering
        begun, ended = stand_in.inbox.sent[:3], stand_in.inbox.sent[3:]
        assert all(isinstance(command, Request) for command in begun)
        assert sorted(c.id for c in ended if isinstance(c, Cancel)) == [r.id for r in begun]
        assert stand_in.is_idle

    asyncio.run(talk())


def test_a_body_whose_client_has_gone_is_not_answered() -> None:
    async def talk() -> None:
        stand_in = StandIn()
        body = json.dumps(BODY).encode()
        messages = [
            {"type": "http.request", "body": body, "more_body": True},
            {"type": "http.disconnect"},
        ]

        async def receive() -> Any:
            return messages.pop(0)

        async def send(_: Any) -> None:
            raise AssertionError("it is answered")

        scope = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}
        await stand_in.app(scope, receive, send)
        assert stand_in.inbox.sent == []

    asyncio.run(talk())
