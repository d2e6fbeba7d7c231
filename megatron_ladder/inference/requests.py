"""What is asked of the engines: prompts, how tokens are chosen, where a text ends; and what they give."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError

GREEDY_BELOW = 1e-5
"""A lower temperature is 0: logits divided by it may not be finite."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and how many at most. Raises UserError when a value is out of range."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together have this probability; with `top_k`, among those."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text, beside those of the model."""
    ignore_end: bool = False
    """The model's own end tokens do not end the text."""
    min_new_tokens: int = 0
    """No end token is chosen before so many tokens."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the text so far become less likely, as in transformers."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(
                f"min_tokens is {self.min_new_tokens}: it must be 0 or more, and at most as many as the "
                f"most new tokens, {self.max_new_tokens}"
            )
        if not 0.01 <= self.repetition_penalty <= 100:  # beyond, logits may not be finite
            raise UserError(f"repetition_penalty is {self.repetition_penalty}: it is 0.01 to 100")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    def ends(self, model_ends: Collection[int]) -> frozenset[int]:
        """The tokens that end a text, of a model with these end tokens."""
        return frozenset(self.stop_ids) | frozenset(() if self.ignore_end else model_ends)


@dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    id: int
    prompt_ids: tuple[int, ...]
    sampling: Sampling

    @property
    def most_tokens(self) -> int:
        """The largest number of tokens that the request may have: the prompt's, and max_new_tokens."""
        return len(self.prompt_ids) + self.sampling.max_new_tokens


@dataclass(frozen=True)
class Output:
    """The tokens that one step has added to a request."""

    id: int
    new_ids: tuple[int, ...]
    """The new tokens, without the token that ends the text."""
    finish_reason: Literal["stop", "length"] | None = None
    """stop: a token has ended the text. length: max_new_tokens are generated. None: not finished."""


def check_text(text: str) -> None:
    """Raises UserError where a text holds half a character, as JSON's escapes and a shell's bytes can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"a prompt is no Unicode text: it holds {text[error.start]!a} at character {error.start}, "
            "half of a surrogate pair or a byte that is not UTF-8"
        ) from error


def check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raises UserError when the model does not have one of these tokens."""
    if wrong := [i for i in ids if not 0 <= i < vocab_size]:
        raise UserError(f"{name} contains token id {wrong[0]}: ids go from 0 to {vocab_size - 1}")


def check_prompt(request: Request, model: ModelConfig) -> None:
    """Raises UserError when a prompt is empty, has a token that the model does not have, or does not fit
    the context with what is to follow."""
    vocab_size, context_length = model.vocab_size, model.max_position_embeddings
    assert vocab_size is not None
    if not request.prompt_ids:
        raise UserError("a prompt is empty: give at least one token to continue")
    check_ids("prompt", request.prompt_ids, vocab_size)
    check_ids("stop_token_ids", request.sampling.stop_ids, vocab_size)
    if request.most_tokens > context_length:
        raise UserError(
            f"a prompt of {len(request.prompt_ids)} tokens and {request.sampling.max_new_tokens} new "
            f"ones exceed the model's context of {context_length}: shorten the prompt or ask for "
            "fewer tokens"
        )
