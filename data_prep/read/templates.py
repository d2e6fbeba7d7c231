"""Chat templates, rendered as transformers renders them (`apply_chat_template`), without importing it."""

import contextlib
import functools
import json
import re
import resource
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_prep.errors import UserError

Message = dict[str, Any]

# Around what a template marks by {% generation %} in rendered text. Nobody's text holds them.
_BEGIN, _END = (f"\ufdd0{uuid.uuid4().hex}\ufdd0" for _ in range(2))

RENDER_S = 30.0
"""Seconds of computing for one conversation."""
MEMORY = 2 << 30
"""Bytes that one conversation may take."""
MOST_CHARACTERS = 64 << 20
"""Of a conversation's text."""


class TooMuch(BaseException):
    """A template takes too long. No `except Exception` keeps it."""


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what is in between is the assistant's."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own way)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.environment.extend(marks_generation=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


class Template:
    """A chat template. It can use its own arguments only, and compute text and nothing else.

    The sandbox keeps it from files and from code, but not from `{% for %}` in `{% for %}` or from
    `"a" * 10 ** 10`: compile and render it within `limited`.
    """

    def __init__(self, source: str, tokens: dict[str, str], day: str | None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        if day is not None:
            environment.globals["strftime_now"] = datetime.fromisoformat(day).strftime
        self._tokens = tokens
        self._template = environment.from_string(source)
        self.marks = hasattr(environment, "marks_generation")
        """Whether it says itself what the assistant's words are."""

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Raises any exception: a template is a program."""
        return re.sub(f"{_BEGIN}|{_END}", "", self._render(messages, add_generation_prompt))

    def marked(self, messages: list[Message]) -> list[tuple[str, bool]]:
        """The rendered text in pieces; of each, whether it is marked as the assistant's."""
        pieces: list[tuple[str, bool]] = []
        depth = 0
        for piece in re.split(f"({_BEGIN}|{_END})", self._render(messages, False)):
            if piece in (_BEGIN, _END):
                depth += 1 if piece == _BEGIN else -1
            elif piece:
                pieces.append((piece, depth > 0))
        return pieces

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        text = self._template.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._tokens,
        )
        if len(text) > MOST_CHARACTERS:
            raise jinja2.TemplateError(f"it writes more than {MOST_CHARACTERS:,} characters")
        return text

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether content may be a list of parts, not only a string."""
        said = (("user", "What is two plus two?"), ("assistant", "Four."))
        try:
            return self.render([{"role": r, "content": text} for r, text in said]) == self.render(
                [{"role": r, "content": [{"type": "text", "text": text}]} for r, text in said]
            )
        except Exception:
            return False


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """What is done in it may take RENDER_S seconds and MEMORY bytes.

    What Python cannot end, such as comparing two lists of a million million numbers, the kernel ends a
    second later, with the process. Other threads than the main one have no limit of time.

    Raises:
        UserError: it takes more.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + MEMORY
    if soft == resource.RLIM_INFINITY or most < soft:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    is_timed = threading.current_thread() is threading.main_thread()
    if is_timed:
        before = signal.signal(signal.SIGVTALRM, _too_late)
        # Again and again: what is raised while Python collects garbage is lost.
        signal.setitimer(signal.ITIMER_VIRTUAL, RENDER_S, 0.1)
        signal.setitimer(signal.ITIMER_PROF, RENDER_S + 1)
    try:
        yield
    except (TooMuch, MemoryError) as error:
        raise UserError(
            f"the chat template takes more than {RENDER_S:.0f} seconds or {MEMORY >> 20} MiB for one "
            "conversation: look at it, or give another (--chat-template FILE)"
        ) from error
    finally:
        if is_timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _too_late(*_: object) -> None:
    raise TooMuch


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=1)
def compiled(template: str) -> Template:
    """The template that `load_template` gave."""
    source, tokens, *day = json.loads(template)
    return Template(source, tokens, day[0] if day else None)


def load_template(tokenizer: Path, given: Path | None, day: str) -> str:
    """A chat template and the special tokens that it may use, as JSON.

    Args:
        given: a file with the template, or the name of one of those beside the tokenizer; None: the one
            that lies beside it, in chat_template.jinja or tokenizer_config.json.
        day: what a template that asks for the date gets, as 2026-11-27. It is in the result, of such a
            template alone.

    Raises:
        UserError: there is no template, or it is not valid.
    """
    config = _config(tokenizer)
    source = _source(tokenizer, given, config)
    template = json.dumps([source, _tokens(config), *([day] if "strftime_now" in source else [])])
    try:
        with limited():  # constants are computed here
            compiled(template)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # SyntaxError and RecursionError among others: Python compiles it too
        raise UserError(
            f"the chat template of {given or tokenizer} is not valid: {str(error)[:500]}"
        ) from error
    return template


def other_templates(tokenizer: Path, given: Path | None) -> list[str]:
    """Names of the templates beside a tokenizer that are not used."""
    found = set(_named(tokenizer, _config(tokenizer)))
    used = "default" if given is None else str(given)
    return sorted(found - {used}) if given is None or used in found else []


def _source(tokenizer: Path, given: Path | None, config: dict[str, Any]) -> str:
    named = _named(tokenizer, config)
    names = ", ".join(sorted(named))
    if given is not None:
        if given.is_file():
            return _text(given)
        if str(given) in named:
            return named[str(given)]
        beside = f", and {tokenizer} has no template of this name: it has {names}" if named else ""
        raise UserError(f"--chat-template {given} does not exist{beside}")
    if "default" in named:
        return named["default"]
    if named:
        raise UserError(
            f"{tokenizer} has several chat templates and none is named default: give --chat-template "
            f"with one of their names: {names}"
        )
    raise UserError(
        f"{tokenizer} has no chat template beside it (chat_template.jinja, or in "
        "tokenizer_config.json): give --chat-template FILE"
    )


def _named(tokenizer: Path, config: dict[str, Any]) -> dict[str, str]:
    """The templates beside a tokenizer by name, as transformers finds them: files come first."""
    folder = tokenizer.parent
    files = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if (default := folder / "chat_template.jinja").is_file():
        return {f.stem: _text(f) for f in files} | {"default": _text(default)}
    if files:
        return {f.stem: _text(f) for f in files}
    own = config.get("chat_template")
    if isinstance(own, str):
        return {"default": own}
    try:
        # A list of {"name": ..., "template": ...}, or an object
        named = (
            dict(own) if isinstance(own, dict) else {t["name"]: t["template"] for t in own or []}
        )
        if not all(isinstance(text, str) for pair in named.items() for text in pair):
            raise TypeError("a template or its name is no text")
        return named
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: chat_template is neither text nor a list of named "
            "templates: give --chat-template FILE"
        ) from error


def _config(tokenizer: Path) -> dict[str, Any]:
    path = tokenizer.parent / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is no object of JSON")
    return config


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise UserError(f"{file} is no text in UTF-8: {error}") from error


def _tokens(config: dict[str, Any]) -> dict[str, str]:
    """The special tokens by their names: bos_token, eos_token, and those that a model has itself."""
    own = config.get("extra_special_tokens")
    own = own if isinstance(own, dict) else {}
    more = config.get("model_specific_special_tokens")
    own = own | more if isinstance(more, dict) else own
    named = {name: token for name, token in config.items() if name.endswith("_token")} | own
    texts = {
        name: token.get("content") if isinstance(token, dict) else token
        for name, token in named.items()
    }
    return {name: text for name, text in texts.items() if isinstance(text, str) and text}
