"""The parts of OpenAI's requests that are supported; other parts that change the text are refused."""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from megatron_ladder.errors import UserError
from megatron_ladder.inference.engine import Sampling

Stop = StrictStr | Annotated[list[StrictStr], Field(max_length=4)] | None
MOST_CHOICES = 16


class StreamOptions(BaseModel):
    """Options for streamed answers."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class _Common(BaseModel):
    # Unknown fields are ignored: those of later versions of the protocol, and those about the caller.
    model_config = ConfigDict(extra="ignore")

    model: str
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Not a field of OpenAI's, but all other servers have it."""
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: Any = None

    def stops(self) -> list[str]:
        """The texts that end a continuation."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in stop if text]

    def refuse_unsupported(self) -> None:
        """Raises UserError for a field that would change the text but is not supported."""
        for name in ("presence_penalty", "frequency_penalty", "logit_bias", "logprobs"):
            if getattr(self, name):
                raise UserError(f"{name} is not supported: leave it out")

    def sampling(self, max_new_tokens: int) -> Sampling:
        """The sampling that the request asks for. As OpenAI's, the default temperature is 1: sampling."""
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = None if self.top_p is None or math.isclose(self.top_p, 1) else self.top_p
        return Sampling(max_new_tokens, temperature, self.top_k, top_p)


class CompletionRequest(_Common):
    """POST /v1/completions"""

    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, as texts or token ids. A single prompt becomes a list of one."""
        given: Any = self.prompt
        is_one = isinstance(given, str) or (given and isinstance(given[0], int))
        return [given] if is_one else given

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.suffix:
            raise UserError("suffix is not supported: leave it out")
        if self.best_of not in (None, 1, self.n):
            raise UserError("best_of is not supported: leave it out")


class TextPart(BaseModel):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it: role and content, with the content as one text."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Common):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.tools:
            raise UserError("tools are not supported: leave them out")
        if self.response_format and self.response_format.get("type") != "text":
            raise UserError("response_format is supported for type text only: leave it out")
