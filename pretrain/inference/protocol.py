"""OpenAI's requests, as far as they are understood: what is not is refused rather than ignored."""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from megatron_ladder.errors import UserError
from megatron_ladder.inference.requests import Sampling

Stop = StrictStr | Annotated[list[StrictStr], Field(max_length=4)] | None
MOST_CHOICES = 16


class StreamOptions(BaseModel):
    """What a stream says besides."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class _Common(BaseModel):
    # Fields of later versions of the protocol: harmless, as are those that only describe the caller.
    model_config = ConfigDict(extra="ignore")

    model: str
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Not OpenAI's, but all other servers'."""
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: Any = None

    def stops(self) -> list[str]:
        """Texts that end a continuation."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in stop if text]

    def refuse_unsupported(self) -> None:
        """Raises UserError on what would change the text and is not there."""
        for name in ("presence_penalty", "frequency_penalty", "logit_bias", "logprobs"):
            if getattr(self, name):
                raise UserError(f"{name} is not supported: leave it out")

    def sampling(self, max_new_tokens: int) -> Sampling:
        """OpenAI's default is to sample."""
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
        """Several; one is a list of one."""
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
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
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
            raise UserError("response_format is not supported but for text: leave it out")
