"""Makes a prompt from a conversation, by the chat template that comes with a model's tokenizer."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ladder.errors import UserError
from pretrain.convert.import_tokenizer import has_tokenizer

Render = Callable[[list[dict[str, str]], dict[str, Any]], str]
"""Of messages, and of what else the template takes."""


def chat_renderer(folder: Path) -> Render:
    """A function that makes a prompt from messages.

    It raises UserError when the template refuses the messages, or when the model has no chat template.

    Args:
        folder: a folder with Hugging Face's tokenizer files; it may be missing.
    """
    if not has_tokenizer(folder) or not _has_template(folder):

        def refuse(_: list[dict[str, str]], __: dict[str, Any]) -> str:
            raise UserError("this model has no chat template: use /v1/completions")

        return refuse
    from transformers import AutoTokenizer

    # transformers renders templates in a sandbox: a template can only compute text.
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    ours = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"documents"}

    def render(messages: list[dict[str, str]], more: dict[str, Any]) -> str:
        if taken := ours & more.keys():
            raise UserError(f"chat_template_kwargs: {min(taken)} is not supported: leave it out")
        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **more
            )
        except Exception as error:  # from the template, such as for two turns of one role in a row
            raise UserError(f"the chat template refuses these messages: {error}") from error

    return render


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(config.get("chat_template"))
