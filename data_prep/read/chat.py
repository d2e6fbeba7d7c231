"""Instruction data: conversations, in which only the assistant's turns are trained on."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError

Pieces = list[tuple[str, bool]]
"""Texts that follow one another; of each, whether it is trained on. Each is encoded by itself."""


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
    """A list of messages; or the prompt and the answer."""
    template: str | None
    """Renders messages (Hugging Face's chat template); None for prompt and answer."""
    eod_text: str
    """The token that ends documents. It is cut where a template ends with it: every document gets one."""


def pieces_of(values: Sequence[Any], chat: Chat) -> tuple[Pieces, str | None]:
    """The pieces of a conversation, and None; or none, and why.

    Args:
        values: what the fields `chat.fields` hold.
    """
    if chat.template is None:
        for name, value in zip(chat.fields, values, strict=True):
            if not isinstance(value, str):
                return [], f"field {name!r} is no string"
        prompt, answer = values
        return [(prompt, False), (answer, True)], None
    (messages,) = values
    if not isinstance(messages, list) or not messages:
        return [], f"field {chat.fields[0]!r} is no list of messages"
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            return [], "a message without role or content"
    if not any(message["role"] == "assistant" for message in messages):
        return [], "no message of the assistant: nothing to train on"
    return _rendered(messages, chat)


def _rendered(messages: list[dict[str, Any]], chat: Chat) -> tuple[Pieces, str | None]:
    """Renders the conversation, and cuts the text where a turn of the assistant begins or ends."""
    import jinja2

    assert chat.template is not None
    template = _compiled(chat.template)
    try:
        whole = template.render(messages=messages, add_generation_prompt=False)
        pieces: Pieces = []
        at = 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = template.render(messages=messages[:number], add_generation_prompt=True)
            after = template.render(messages=messages[: number + 1], add_generation_prompt=False)
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= at):
                return [], "the chat template changes the text of a turn when other turns follow"
            pieces += [(whole[at : len(before)], False), (whole[len(before) : len(after)], True)]
            at = len(after)
        pieces.append((whole[at:], False))
    except jinja2.TemplateError as error:
        return [], f"the chat template: {error}"
    pieces = [piece for piece in pieces if piece[0]]
    text, trained = pieces[-1]
    pieces[-1] = (text.rstrip("\n").removesuffix(chat.eod_text), trained)
    return pieces, None


@functools.lru_cache(maxsize=1)
def _compiled(template: str) -> Any:
    """The template as transformers compiles it: it can use its own arguments only."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    source, tokens = json.loads(template)
    environment.globals.update(tokens)
    return environment.from_string(source)


def load_template(tokenizer: Path, given: Path | None) -> str:
    """A chat template and the special tokens that it may use, as JSON.

    Args:
        given: a file with the template; None: the one that lies beside the tokenizer, in
            chat_template.jinja or tokenizer_config.json.

    Raises:
        UserError: there is no template, or it is not valid.
    """
    import jinja2

    config_path = tokenizer.parent / "tokenizer_config.json"
    try:
        config = json.loads(config_path.read_text()) if config_path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{config_path} is no JSON: {error}") from error
    beside = tokenizer.parent / "chat_template.jinja"
    if given is not None and not given.is_file():
        raise UserError(f"--chat-template {given} does not exist")
    own = given or (beside if beside.is_file() else None)
    source = own.read_text() if own else config.get("chat_template")
    if not isinstance(source, str):
        raise UserError(
            f"{tokenizer} has no chat template beside it (chat_template.jinja, or in "
            "tokenizer_config.json): give --chat-template FILE"
        )
    tokens = {
        name: token["content"] if isinstance(token, dict) else token
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (token := config.get(name))
    }
    template = json.dumps([source, tokens])
    try:
        _compiled(template)
    except jinja2.TemplateError as error:
        raise UserError(
            f"the chat template of {given or tokenizer} is not valid: {error}"
        ) from error
    return template
