"""OpenAI's requests, and fields that clients of other servers add to them.

There are three kinds of fields: supported ones; those that would change nothing here, which are accepted;
and all others, which are refused, because a field that changes the text must not be ignored.
"""

import math
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from megatron_ladder.errors import UserError
from megatron_ladder.inference.requests import Sampling

MOST_CHOICES = 16
MOST_MESSAGES = 10_000
"""Of a conversation, and the most text parts of a message."""
MOST_PROMPTS = 10_000
MOST_STOP_CHARACTERS = 1000
MOST_STRUCTURES = 100_000
"""Lists and objects of a body: an empty one takes some hundred bytes of memory."""
# To the end of the text where there is no closing quote, so that it takes time in proportion to the text.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)

# `fail_fast`: a list ends at its first mistake. An error for each of a million items would take gigabytes.
StopText = Annotated[StrictStr, Field(max_length=MOST_STOP_CHARACTERS)]
Stop = StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=4)] | None
Count = Annotated[int, Field(ge=1, lt=1 << 31)]
TokenId = Annotated[StrictInt, Field(ge=-(1 << 31), lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]

# They describe the caller, or how the answer is stored, sent or billed. `seed`: docs/guides/serve.md.
HARMLESS = frozenset(
    (
        *("user", "seed", "metadata", "store", "service_tier", "safety_identifier", "request_id"),
        *("prompt_cache_key", "prompt_cache_retention", "priority", "parallel_tool_calls"),
        *("cache_prompt", "keep_alive"),
    )
)
# Of a message or of stream_options. Clients send messages back as some server gave them.
HARMLESS_INSIDE = frozenset(("id", "annotations", "metadata", "include_obfuscation"))
# What is accepted where it says what is done anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "min_p": (0,),
    "typical_p": (1,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,),
    "prompt_logprobs": (0,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
NEUTRAL_OF_COMPLETIONS = {"suffix": ("",), "add_special_tokens": (True,)}
NEUTRAL_OF_CHAT: dict[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "add_special_tokens": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}


def _refuse_more(part: BaseModel, where: str) -> None:
    """Raises UserError for a field of a part of the request that is not known and asks for something."""
    for name, value in (part.model_extra or {}).items():
        if value and name not in HARMLESS_INSIDE:
            raise UserError(f"{where}.{name} is not supported: leave it out")


class StreamOptions(BaseModel):
    """Options for streamed answers."""

    model_config = ConfigDict(extra="allow")
    include_usage: bool = False


class _Common(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Not OpenAI's, but those of all other servers:
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    """-1 and 0: no limit."""
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=128)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    repetition_penalty: float | None = None

    def stops(self) -> list[str]:
        """The texts that end a continuation."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in stop if text]

    def _neutral(self) -> dict[str, tuple[Any, ...]]:
        return NEUTRAL

    def refuse_unsupported(self) -> None:
        """Raises UserError for a field that would change the text but is not supported."""
        neutral = self._neutral()
        for name, value in (self.model_extra or {}).items():
            if value is None or name in HARMLESS:
                continue
            if value not in neutral.get(name, ()):
                raise UserError(f"{name} is not supported: leave it out")
        if self.stream_options:
            _refuse_more(self.stream_options, "stream_options")

    def sampling(self, max_new_tokens: int, stop_ids: tuple[int, ...] = ()) -> Sampling:
        """The sampling that the request asks for. As OpenAI's, the default temperature is 1: sampling.

        Args:
            stop_ids: tokens that end a continuation, beside `stop_token_ids`.
        """
        return Sampling(
            max_new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k if self.top_k and self.top_k > 0 else None,
            top_p=None if self.top_p is None or math.isclose(self.top_p, 1) else self.top_p,
            stop_ids=(*(self.stop_token_ids or ()), *stop_ids),
            ignore_end=bool(self.ignore_eos),
            min_new_tokens=self.min_tokens or 0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
        )


class CompletionRequest(_Common):
    """POST /v1/completions"""

    prompt: (
        StrictStr
        | Annotated[list[StrictStr], Field(fail_fast=True, max_length=MOST_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(fail_fast=True, max_length=MOST_PROMPTS)]
    )
    max_tokens: Count | None = None
    echo: bool | None = None
    best_of: int | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, as texts or token ids. A single prompt becomes a list of one."""
        given: Any = self.prompt
        is_one = isinstance(given, str) or (given and isinstance(given[0], int))
        return [given] if is_one else given

    def _neutral(self) -> dict[str, tuple[Any, ...]]:
        return NEUTRAL | NEUTRAL_OF_COMPLETIONS

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.best_of not in (None, 1, self.n):
            raise UserError("best_of is not supported: leave it out")


class TextPart(BaseModel):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: (
        str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MOST_MESSAGES)] | None
    ) = None
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _understood(cls, given: Any) -> Any:
        if isinstance(given, dict):
            calls = any(given.get(name) for name in ("tool_calls", "function_call"))
            if calls or given.get("role") in ("tool", "function"):
                raise ValueError("tools are not supported: leave out their calls and their results")
            for part in given["content"] if isinstance(given.get("content"), list) else ():
                if isinstance(part, dict) and part.get("type") != "text":
                    raise ValueError(
                        f"content of type {part.get('type')} is not supported, but text"
                    )
        return given

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it. No content is an empty text: templates write None."""
        text = self.content or ""
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text, **({"name": self.name} if self.name else {})}


class ChatRequest(_Common):
    """POST /v1/chat/completions"""

    messages: Annotated[
        list[Message], Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES)
    ]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """What the model's template takes beside the messages, such as Qwen3's enable_thinking."""

    def _neutral(self) -> dict[str, tuple[Any, ...]]:
        return NEUTRAL | NEUTRAL_OF_CHAT

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        for number, message in enumerate(self.messages):
            _refuse_more(message, f"messages.{number}")


Asked = TypeVar("Asked", bound=_Common)


def parse(kind: type[Asked], body: bytes) -> Asked:
    """The request that a body holds, without the fields that change nothing.

    Raises:
        UserError: the body is no JSON, or no such request, or asks for what is not supported.
    """
    if (
        _structures(body) > MOST_STRUCTURES
        and _structures(_STRING.sub(b"", body)) > MOST_STRUCTURES
    ):
        raise UserError(f"the body has more than {MOST_STRUCTURES:,} lists and objects")
    try:
        # From bytes: no Python object is made of what a field does not take.
        asked = kind.model_validate_json(body)
    except ValidationError as problem:
        raise UserError(_said(problem)) from problem
    asked.refuse_unsupported()
    if asked.model_extra:
        asked.model_extra.clear()
    return asked


def _structures(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _said(problem: ValidationError) -> str:
    # A field that may be one of several things has an error for each; some say only that it is another.
    errors = problem.errors(include_url=False, include_context=False, include_input=False)
    first = next((e for e in errors if not e["type"].endswith("_type")), errors[0])
    where = ".".join(str(part) for part in first["loc"])
    said = first["msg"].removeprefix("Value error, ")
    return f"{where}: {said}" if where else said
