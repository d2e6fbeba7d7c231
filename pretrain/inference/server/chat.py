"""Makes a prompt from a conversation, by the chat template that comes with a model's tokenizer."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_ladder.errors import UserError
from megatron_ladder.json_files import read_json
from pretrain.convert.import_tokenizer import has_tokenizer
from pretrain.data.tokenizer_facts import MOST_BYTES
from pretrain.inference.server.template_process import TemplateProcess

Render = Callable[[list[dict[str, str]], dict[str, Any]], Awaitable[str]]
"""Of messages, and of what else the template takes."""


def chat_renderer(folder: Path) -> Render:
    """A function that makes a prompt from messages. Call it before this process has threads.

    The function raises UserError when the template refuses the messages, or takes too long, or when the
    model has no chat template.

    Args:
        folder: a folder with Hugging Face's tokenizer files; it may be missing.
    """
    if not has_tokenizer(folder) or not _has_template(folder):

        async def refuse(_: list[dict[str, str]], __: dict[str, Any]) -> str:
            raise UserError("this model has no chat template: use /v1/completions")

        return refuse
    from transformers import AutoTokenizer

    # transformers renders templates in a sandbox: a template can only compute text.
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ours = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"documents"}

    def rendering(given: dict[str, Any]) -> str:
        return tokenizer.apply_chat_template(
            given["messages"], tokenize=False, add_generation_prompt=True, **given["more"]
        )

    process = TemplateProcess(rendering)
    thread = ThreadPoolExecutor(1, thread_name_prefix="template")  # a process renders one at a time

    async def render(messages: list[dict[str, str]], more: dict[str, Any]) -> str:
        if taken := ours & more.keys():
            raise UserError(f"chat_template_kwargs: {min(taken)} is not supported: leave it out")
        given = {"messages": messages, "more": more}
        return await asyncio.get_running_loop().run_in_executor(thread, process.render, given)

    return render


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        config = read_json(folder / "tokenizer_config.json", "a tokenizer's file", MOST_BYTES)
    except (OSError, UserError):
        return False
    return bool(config.get("chat_template"))
