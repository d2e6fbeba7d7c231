"""Instruction data: conversations, in which only the assistant's turns are trained on."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError

if TYPE_CHECKING:  # jinja2 is imported where there is a template
    from data_prep.read.templates import Message, Template

Pieces = list[tuple[str, bool]]
"""Texts that follow one another; of each, whether it is trained on. Each is encoded by itself. What holds
for the last one holds for the end of the document."""
# What an assistant without content has instead: calls of tools, or reasoning.
INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")


class Conversation(str):
    """A document whose text is `pieces`, joined."""

    __slots__ = ("pieces",)
    pieces: Pieces

    def __new__(cls, pieces: Pieces) -> "Conversation":
        text = super().__new__(cls, "".join(text for text, _ in pieces))
        text.pieces = pieces
        return text


@dataclass(frozen=True)
class Chat:
    """Which fields of a JSON line or a row are a conversation, and how they become text."""

    fields: tuple[str, ...]
    """A list of messages; or what comes before the answer, and the answer."""
    template: str | None
    """Renders messages (Hugging Face's chat template); None for prompt and answer."""
    eod_text: str
    """The token that ends documents. It is cut where a template ends with it: every document gets one."""
    prompt: str | None = None
    """The prompt, with fields in braces; None: the fields are pieces as they are."""


def prompt_fields(prompt: str) -> tuple[str, ...]:
    """The fields that a prompt names in braces, each once, in their order.

    Raises:
        UserError: it is not valid, or names none.
    """
    try:
        parts = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise UserError(f"{error}: {{{{ and }}}} are braces that name no field") from error
    named = [part for part in parts if part[1] is not None]
    for _, name, form, conversion in named:
        if not name or form or conversion:
            raise UserError(
                f"{{{name}...}}: braces hold a field's name and nothing else; {{{{ and }}}} are braces"
            )
    if not named:
        raise UserError("it names no field: write {source} where the field source is to stand")
    return tuple(dict.fromkeys(str(name) for _, name, _, _ in named))


def filled(prompt: str, values: Mapping[str, str]) -> str:
    """A prompt with the values of its fields. Braces in values are text."""
    parts = string.Formatter().parse(prompt)
    return "".join(text + ("" if name is None else values[name]) for text, name, _, _ in parts)


def pieces_of(values: Sequence[Any], chat: Chat) -> tuple[Pieces, str | None]:
    """The pieces of a conversation, and None; or none, and why.

    Args:
        values: what the fields `chat.fields` hold.
    """
    if chat.template is None:
        for name, value in zip(chat.fields, values, strict=True):
            if not isinstance(value, str):
                return [], f"field {name!r} is no string"
        *asked, answer = values
        if chat.prompt is not None:
            asked = [filled(chat.prompt, dict(zip(chat.fields, asked, strict=False)))]
        return [*((text, False) for text in asked), (answer, True)], None
    (messages,) = values
    if not isinstance(messages, list) or not messages:
        return [], f"field {chat.fields[0]!r} is no list of messages"
    from data_prep.read.templates import limited

    try:
        with limited():
            return _rendered(messages, chat)
    except UserError:
        raise
    except Exception as error:  # a template is a program, and may fail in any way
        kind = "" if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: "
        return [], f"the chat template: {kind}{str(error)[:500]}"


def _rendered(messages: list[Any], chat: Chat) -> tuple[Pieces, str | None]:
    from data_prep.read.templates import compiled

    assert chat.template is not None
    template = compiled(chat.template)
    said = []
    for message in messages:
        prepared, problem = _prepared(message, template)
        if problem is not None:
            return [], problem
        said.append(prepared)
    if not template.marks and not any(message["role"] == "assistant" for message in said):
        return [], "no message of the assistant: nothing to train on"
    pieces, problem = _by_marks(said, template) if template.marks else _by_turns(said, template)
    return ([], problem) if problem is not None else (_without_end(pieces, chat.eod_text), None)


def without_nulls(value: Any) -> Any:
    """A row's value as JSON lines would have it: in a table each object has the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(v) for key, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def _prepared(message: Any, template: "Template") -> tuple["Message", str | None]:
    """A message as templates take it, and None; or why there is none. As in transformers, a key that is
    null is a key that is not there."""
    if not isinstance(message, dict):
        return {}, "a message that is no object"
    message = {key: value for key, value in message.items() if value is not None}
    if not isinstance(message.get("role"), str):
        return {}, f"a message without role or content: it has {', '.join(map(str, message))}"
    if "content" not in message:
        if not any(message.get(key) for key in INSTEAD_OF_CONTENT):
            return {}, "a message without role or content, or with content that is null"
    elif isinstance(message["content"], list):
        texts = []
        for part in message["content"]:
            text = part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str) or part.get("type", "text") != "text":
                kind = part.get("type") if isinstance(part, dict) else part
                return {}, f"a message with a part that is no text: {kind!r}"
            texts.append(text)
        parts = [{"type": "text", "text": text} for text in texts]
        message["content"] = parts if template.takes_parts else "".join(texts)
    elif not isinstance(message["content"], str):
        return {}, "a message whose content is neither text nor a list of parts"
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if name in message), None)
    if reasoning is not None:  # templates read it under one of two names
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message, None


def _by_marks(messages: list["Message"], template: "Template") -> tuple[Pieces, str | None]:
    """What the template marks by {% generation %} is trained on, and nothing else."""
    pieces = template.marked(messages)
    if not any(text.strip("\n") for text, trained in pieces if trained):
        return [], "the chat template marks nothing to train on"
    return pieces, None


def _by_turns(messages: list["Message"], template: "Template") -> tuple[Pieces, str | None]:
    """The text is cut where a turn of the assistant begins or ends."""
    whole = template.render(messages)
    pieces: Pieces = []
    at = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:number], add_generation_prompt=True)
        after = template.render(messages[: number + 1])
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= at):
            return [], "the chat template changes the text of a turn when other turns follow"
        pieces += [(whole[at : len(before)], False), (whole[len(before) : len(after)], True)]
        at = len(after)
    pieces.append((whole[at:], False))
    if not any(text.strip("\n") for text, trained in pieces if trained):
        return [], "the chat template gives the assistant no text"
    return [piece for piece in pieces if piece[0]], None


def _without_end(pieces: Pieces, eod_text: str) -> Pieces:
    """Cuts ends of lines, and the token that ends documents: every document gets one. It is trained on as
    the text before it is."""
    while True:
        text, trained = pieces.pop()
        if text := text.rstrip("\n"):
            break
    return [*pieces, (text.removesuffix(eod_text), trained)]
