"""`serve`'s application with an engine that answers at once, to send requests to in this process."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
from tokenizers import Tokenizer

from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.inference.requests import Output, Request, check_prompt
from pretrain.convert.model_text import ModelText
from pretrain.inference.server.answers import Served
from pretrain.inference.server.app import make_app
from pretrain.inference.server.chat import Render
from pretrain.inference.server.frontdesk import FrontDesk
from pretrain.inference.server.metrics import Metrics
from tests.chat_models import SPECIAL, tokenizer_json

CONTEXT = 64
MOST_RUNNING, MOST_WAITING = 2, 6
MOST_BODY_BYTES = 1 << 20


class Engine:
    """Of a small model; it generates nothing."""

    num_running = num_waiting = free_blocks = 0

    def __init__(self, vocab_size: int) -> None:
        self._model = ModelConfig(
            num_layers=1,
            hidden_size=8,
            ffn_hidden_size=8,
            num_attention_heads=1,
            vocab_size=vocab_size,
            max_position_embeddings=CONTEXT,
        )

    def check(self, request: Request) -> None:
        check_prompt(request, self._model)


class Inbox:
    """Answers every request with one token, unless the engine `is_stuck`."""

    def __init__(self) -> None:
        self.desk: Any = None
        self.is_stuck = False
        self.sent: list[Any] = []

    def put(self, command: Any) -> None:
        self.sent.append(command)
        if isinstance(command, Request) and not self.is_stuck:
            outputs = [Output(command.id, (command.prompt_ids[-1],), "length")]
            asyncio.get_running_loop().call_soon(self.desk._hand_out, outputs)


async def plain(messages: list[dict[str, str]], more: dict[str, Any]) -> str:
    """A chat template that takes no other arguments than messages."""
    if more:
        raise UserError("the template takes nothing else")
    return "".join(f"{m['role']}: {m['content']}\n" for m in messages)


class StandIn:
    """An application, its desk and its inbox.

    Args:
        tokenizer: None: a small byte-level BPE.
        render: makes a prompt of messages.
        origins: of web pages that may send requests.
    """

    def __init__(
        self, tokenizer: Any = None, render: Render = plain, origins: Sequence[str] = ()
    ) -> None:
        theirs: Tokenizer = tokenizer or tokenizer_json()
        size = theirs.get_vocab_size()
        engine: Any = Engine(size)
        metrics = Metrics()
        self.desk = FrontDesk(engine, metrics, max_running=MOST_RUNNING, max_waiting=MOST_WAITING)
        self.inbox = Inbox()
        self.inbox.desk, self.desk.inbox = self.desk, self.inbox  # type: ignore[assignment]
        special = {text: theirs.token_to_id(text) for text in SPECIAL}
        served = Served("model", ModelText(theirs, ()), special, CONTEXT, render, 0)
        self.app = make_app(served, self.desk, metrics, MOST_BODY_BYTES, origins)

    def client(self) -> httpx.AsyncClient:
        """An HTTP client of this application. What the application raises is raised."""
        transport = httpx.ASGITransport(self.app)
        return httpx.AsyncClient(transport=transport, base_url="http://model")

    @property
    def is_idle(self) -> bool:
        """Whether no request has a place."""
        return not self.desk._open
