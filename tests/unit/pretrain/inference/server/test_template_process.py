"""A chat template may not keep `serve` busy, or take its memory, for ever."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ladder.errors import UserError
from pretrain.inference.server import template_process
from pretrain.inference.server.chat import chat_renderer
from pretrain.inference.server.template_process import TemplateProcess
from tests.chat_models import MESSAGES, TEMPLATE, tokenizer_json, write_tokenizer


def rendering(given: dict[str, Any]) -> str:
    kind = given["kind"]
    if kind == "text":
        return given["text"]
    if kind == "loop":
        while True:
            pass
    if kind == "loop that Python cannot end":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGVTALRM})
        while True:
            pass
    if kind == "memory":
        return "a" * (2 * template_process.MEMORY)
    if kind == "long":
        return "a" * (template_process.MOST_CHARACTERS + 1)
    if kind == "half a character":
        return "\ud800"
    if kind == "end":
        os._exit(0 if given["text"] else 3)
    raise ValueError("two turns of one role \ud800")


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[TemplateProcess]:
    monkeypatch.setattr(template_process, "RENDER_S", 0.2)
    monkeypatch.setattr(template_process, "MEMORY", 64 << 20)
    process = TemplateProcess(rendering)
    yield process
    process.close()


def test_numbers_of_more_than_64_bits_are_refused(process: TemplateProcess) -> None:
    with pytest.raises(UserError, match="64-bit"):
        process.render({"kind": "text", "text": 10**30})


def test_what_a_template_does_is_refused_in_a_sentence(process: TemplateProcess) -> None:
    for kind, says in (
        ("loop", "takes more than"),
        ("loop that Python cannot end", "takes more than"),
        ("memory", "takes more than 64 MiB"),
        ("long", "writes more than"),
        ("half a character", "no Unicode text"),
        ("end", "takes more than"),
        ("other", "refuses these messages: two turns of one role ?"),
    ):
        with pytest.raises(UserError, match=says) as said:
            process.render({"kind": kind, "text": ""})
        assert "the chat template" in str(said.value), kind
        assert process.render({"kind": "text", "text": "hello"}) == "hello", kind


def test_a_process_that_has_ended_is_said(process: TemplateProcess) -> None:
    with pytest.raises(UserError, match="its process has ended"):
        process.render({"kind": "end", "text": "and its parent with it"})
    with pytest.raises(UserError, match="its process has ended"):
        process.render({"kind": "text", "text": "hello"})


def test_it_ends_with_the_process_that_made_it() -> None:
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        TemplateProcess(rendering)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(writing)
    os.waitpid(parent, 0)
    with os.fdopen(reading, "rb") as file:
        assert file.read() == b""  # all that could write have ended


def test_a_folders_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "RENDER_S", 0.5)
    write_tokenizer(tmp_path, tokenizer_json())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    twice = "{% for i in range(times or 0) %}{% for j in range(times) %}{% endfor %}{% endfor %}"
    config["chat_template"] = twice + TEMPLATE
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    render = chat_renderer(tmp_path)
    expected = (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nquick brown<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )

    async def talk() -> None:
        assert await render(MESSAGES, {}) == expected
        with pytest.raises(UserError, match="takes more than"):
            await render(MESSAGES, {"times": 99_999})
        with pytest.raises(UserError, match="Range too big"):
            await render(MESSAGES, {"times": 10**9})
        with pytest.raises(UserError, match="chat_template is not supported"):
            await render(MESSAGES, {"chat_template": "x"})
        assert await render(MESSAGES, {"times": 2}) == expected

    asyncio.run(talk())
