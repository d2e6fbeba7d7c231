"""Random chat templates on random conversations: as `data tokenize` and as `serve` render them.

Each gives a text, or is refused in a sentence: no exception, no code that runs, no time or memory without
end.
"""

import contextlib
import json
import os
import resource
import sys
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from data_prep.errors import UserError
from data_prep.read import templates
from data_prep.read.chat import Chat, pieces_of
from megatron_ladder.errors import UserError as Refused
from pretrain.inference.server import template_process
from pretrain.inference.server.template_process import TemplateProcess

SEEDS = st.integers(0, (1 << 64) - 1)
INPUTS = 5
"""Conversations that a template renders: compiling it takes longer than rendering one."""
MOST_GROWTH = 400 << 10  # KiB: what MEMORY below allows, and a margin

NAMES = (
    "messages",
    "m",
    "m.role",
    "m.content",
    "m['content']",
    "x",
    "loop.index",
    "tools",
    "bos_token",
)
NAMES += (
    "add_generation_prompt",
    "messages[0]",
    "messages[-1].content",
    "ns.x",
    "loop",
    "nothing.at.all",
)
CONSTANTS = (
    "''",
    "'a'",
    "'<|im_start|>'",
    "0",
    "1",
    "-1",
    "10",
    "1.5",
    "none",
    "true",
    "[]",
    "[1, 'a']",
)
CONSTANTS += (
    "{'a': 1}",
    "99999",
    "10**9",
    "10**10",
    "9**9**9",
    "'%99999999d'",
    "'{:99999999}'",
    "(1, 2)",
)
CONTENTS = ("", "a", "two words", "{{ 1 }}", "\x00", "<|im_start|>")
OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "not in", "and", "or", "is")
FILTERS = (
    "length",
    "upper",
    "trim",
    "tojson",
    "list",
    "join(', ')",
    "first",
    "last",
    "string",
    "int",
)
FILTERS += (
    "center(10**10)",
    "indent(10**9)",
    "replace('', 'aa')",
    "batch(3)",
    "slice(10**8)",
    "sum(start=[])",
)
FILTERS += (
    "format(1)",
    "round(99)",
    "wordwrap(1)",
    "urlize",
    "striptags",
    "pprint",
    "xmlattr",
    "safe",
    "map('x')",
)
FILTERS += (
    "attr('__class__')",
    "select",
    "unique",
    "sort",
    "reverse",
    "dictsort",
    "tojson(indent=10**9)",
    "e",
)
METHODS = (
    "split()",
    "strip()",
    "format(1)",
    "format(x=messages)",
    "center(10**10)",
    "zfill(10**9)",
    "items()",
)
METHODS += (
    "append(1)",
    "__class__",
    "__class__.__mro__",
    "__init__.__globals__",
    "join(['a'])",
    "encode()",
)
METHODS += (
    "replace('', 'a' * 999)",
    "expandtabs(10**9)",
    "ljust(10**10)",
    "__subclasses__()",
    "get('a')",
    "pop()",
)
CALLS = (
    "range(3)",
    "range(99999)",
    "range(10**9)",
    "lipsum(n=10**6)",
    "dict(a=1)",
    "namespace(x='aaaa')",
)
CALLS += (
    "cycler(1, 2)",
    "joiner()",
    "raise_exception('no')",
    "strftime_now('%Y')",
    "f(x)",
    "caller()",
)
CALLS += (
    "open('/etc/passwd')",
    "eval('1')",
    "self.__init__",
    "cycler.__init__.__globals__.os.system('true')",
)
# Of code that runs. Python reports such events whoever causes them.
EVENTS = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "tempfile.", "urllib.", "ftplib.")
ALLOWED = ("os.putenv", "os.scandir", "os.listdir")


def expression(r: Random, depth: int = 3) -> str:
    """A value in jinja's language."""
    kind = r.randrange(8 if depth else 3)
    if kind < 2:
        return r.choice(NAMES)
    if kind < 3:
        return r.choice(CONSTANTS[:12] if r.random() < 0.8 else CONSTANTS)
    inner = expression(r, depth - 1)
    if kind < 5:
        return f"({inner} {r.choice(OPERATORS)} {expression(r, depth - 1)})"
    if kind < 6:
        return f"({inner})|{r.choice(FILTERS)}"
    if kind < 7:
        return f"({inner}).{r.choice(METHODS)}"
    return r.choice(CALLS) if r.random() < 0.5 else f"({inner})[{expression(r, depth - 1)}]"


def statements(r: Random, depth: int = 2) -> str:
    """Some statements and texts of a template."""
    return "".join(statement(r, depth) for _ in range(r.randrange(1, 4)))


def statement(r: Random, depth: int) -> str:
    kind = r.randrange(12 if depth else 5)
    if kind < 1:
        return r.choice(
            ("<|im_start|>", "\n", " ", "{", "{{", "{%", "{# a #}", "%}", "\u00e9", "\ud800")
        )
    if kind < 4:
        return "{{ " + expression(r) + r.choice((" }}", " -}}", " }}"))
    if kind < 5:
        return "{% set " + r.choice(("x", "ns", "ns.x", "m")) + " = " + expression(r) + " %}"
    body = statements(r, depth - 1)
    if kind < 8:
        return (
            "{% for m in " + r.choice(("messages", expression(r))) + " %}" + body + "{% endfor %}"
        )
    if kind < 10:
        return "{% if " + expression(r) + " %}" + body + "{% else %}" + body + "{% endif %}"
    if kind < 11:
        return "{% macro f(x) %}" + body + "{% endmacro %}{{ f(1) }}"
    return (
        r.choice(("{% generation %}", "{% filter upper %}", "{% break %}", "{% include 'a' %}"))
        + body
    )


def template(r: Random) -> str:
    """A template, of which one in some does what grows."""
    source = statements(r)
    return source if r.random() < 0.3 else "{% for m in messages %}" + source + "{% endfor %}"


def conversation(r: Random) -> list[dict[str, Any]]:
    """Messages, of which the last one is the assistant's: without one, nothing is rendered."""
    roles = ("user", "assistant", "system", "x")
    said = [(r.choice(roles), text) for text in r.choices(CONTENTS, k=r.randrange(4))]
    said.append(("assistant", r.choice(CONTENTS)))
    return [{"role": role, "content": text} for role, text in said]


is_rendering = False
SEEN = os.pipe()
os.set_blocking(SEEN[0], False)


def _audit(event: str, _: Any) -> None:
    if is_rendering and event.startswith(EVENTS) and event not in ALLOWED:
        os.write(SEEN[1], event.encode())


def seen() -> str:
    """What templates have caused, in this process or in those made of it."""
    try:
        return os.read(SEEN[0], 1 << 16).decode()
    except BlockingIOError:
        return ""


@contextlib.contextmanager
def audited() -> Iterator[None]:
    """Notes the code that runs which a template has no right to."""
    global is_rendering
    is_rendering = True
    try:
        yield
    finally:
        is_rendering = False


@pytest.fixture(scope="module", autouse=True)
def _audits() -> None:
    sys.addaudithook(_audit)  # for the rest of the process: it cannot be taken away


@given(SEEDS)
def test_as_data_tokenize_renders(seed: int) -> None:
    r = Random(seed)
    source = template(r)
    try:
        json.dumps(source).encode()
        chat = Chat(("messages",), json.dumps([source, {"bos_token": "<s>"}, "2026-11-27"]), "")
    except UnicodeEncodeError:
        return
    refused = "takes more than"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.MonkeyPatch.context() as patch, audited():
        patch.setattr(templates, "RENDER_S", 0.1)
        patch.setattr(templates, "MEMORY", 256 << 20)
        patch.setattr(templates, "MOST_CHARACTERS", 1 << 20)
        for _ in range(INPUTS):
            try:
                pieces, problem = pieces_of([conversation(r)], chat)
            except UserError as error:
                refused = str(error)
                break
            assert all(isinstance(text, str) for text, _ in pieces), source
            assert problem is None or (isinstance(problem, str) and len(problem) < 700), source
    assert "takes more than" in refused, source
    assert seen() == "", source
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH, source


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    def rendering(given: dict[str, Any]) -> str:
        with audited():
            (text,), _ = render_jinja_template(
                [given["messages"]],
                chat_template=given["template"],
                add_generation_prompt=True,
                **{"bos_token": "<s>"},
            )
        return text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_process, "RENDER_S", 0.1)
        patch.setattr(template_process, "MEMORY", 256 << 20)
        patch.setattr(template_process, "MOST_CHARACTERS", 1 << 20)
        process = TemplateProcess(rendering)
        yield process
        process.close()


@given(SEEDS)
def test_as_serve_renders(process: TemplateProcess, seed: int) -> None:
    r = Random(seed)
    source = template(r).replace("\ud800", "")  # JSON cannot hold it
    for _ in range(INPUTS):
        refused, text = "", ""
        try:
            text = process.render({"messages": conversation(r), "template": source})
        except Refused as error:
            refused = str(error)
        assert len(text) <= 1 << 20 and len(refused) < 700, source
        assert not refused or "the chat template" in refused, source
        assert "its process has ended" not in refused, source
        assert seen() == "", source
        if "takes more than" in refused:
            break
    # The conversations of others are rendered as before.
    assert process.render({"messages": conversation(r), "template": "{{ 'a' * 3 }}"}) == "aaa"


def test_code_that_runs_is_seen() -> None:
    """The audit itself, in a process of its own too."""
    for make in (os.getpid, os.fork):
        child = make()
        with audited(), contextlib.suppress(OSError):
            os.remove("/nothing/at/all")  # noqa: PTH107
        if child == 0:
            os._exit(0)
        if make is os.fork:
            os.waitpid(child, 0)
            assert seen() == "os.remove" * 2
        else:
            assert seen() == "os.remove"
