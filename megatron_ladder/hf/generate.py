"""Continues prompts with the model of an exported folder."""

import logging
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

import megatron_ladder.hf  # noqa: F401 (registers "ladder" with transformers)
from megatron_ladder.errors import UserError
from megatron_ladder.hf.end_ids import end_ids
from megatron_ladder.hf.from_hf import read_hf_config
from megatron_ladder.hf.model_config import experts_fields
from megatron_ladder.inference.cache import Part, check_batch, widest
from megatron_ladder.inference.requests import Sampling, check_text
from megatron_ladder.json_files import in_words, short

logger = logging.getLogger(__name__)
_FILL = 0
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def generate_text(
    folder: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[str]:
    """Continues prompts. A continuation stops at any of the folder's end tokens.

    The model runs on the GPU if there is one, in the dtype of the weights. Otherwise it runs on the CPU in
    fp32. No code from `folder` is run.

    Args:
        folder: written by `export_folder`.
        prompts: the prompts. They are generated as one batch.
        max_new_tokens: the most new tokens for each prompt.
        temperature: 0 takes the likeliest token each time.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: for sampling.

    Returns:
        Each prompt followed by its continuation.

    Raises:
        UserError: `folder` is missing, incomplete or damaged, a prompt is empty or does not fit the context
            together with its new tokens, the prompts do not fit the memory, or an option is out of range.
    """
    folder = Path(folder)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p)  # refuses what is out of range
    config = _check_folder(folder)
    context, vocab_size = config.max_position_embeddings, config.vocab_size
    ends = end_ids(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises all kinds
        raise UserError(f"{folder}: its tokenizer cannot be read: {in_words(error)}") from error
    for prompt in prompts:
        check_text(prompt)
    encoded = [tokenizer.encode(p, verbose=False) for p in prompts]
    for ids in encoded:
        if not ids:
            raise UserError("a prompt is empty: give at least one character to continue")
        if max(ids) >= vocab_size:
            raise UserError(
                f"a prompt holds the token {tokenizer.decode([max(ids)])!r}, id {max(ids)}: the model has "
                f"{vocab_size} tokens"
            )
        if len(ids) + max_new_tokens > context:
            raise UserError(
                f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the model's "
                f"context of {context}: shorten the prompt or ask for fewer tokens"
            )
    if not encoded:
        return []

    transformers_logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            dtype="auto" if device == "cuda" else torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: its weights cannot be loaded: {in_words(error)}") from error
    if missing := sorted(found["missing_keys"]):  # transformers draws them at random
        raise UserError(f"{folder}: its weights cannot be loaded: {short(missing[0])} is missing")
    model = model.to(device).eval()
    # The folder's own defaults for sampling, beams and penalties would come on top of what is asked for.
    model.generation_config = GenerationConfig()
    length = max(map(len, encoded))
    said = check_batch(
        Part.of(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
            ffn=widest(config.hidden_size, config.intermediate_size, experts_fields(config)),
            vocab_size=vocab_size,
            dtype=model.dtype,
            device=model.device,
        ),
        prompts=len(encoded),
        longest_prompt=length,
        longest=length + max_new_tokens,
        instead="give fewer or shorter ones, or use `serve`, where prompts wait for each other",
    )
    logger.info("%s", said)
    # Many tokenizers have no token to pad with; what is masked, or comes after a text's end, is not seen.
    input_ids = torch.tensor([[_FILL] * (length - len(ids)) + ids for ids in encoded])
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in encoded])
    how: dict[str, Any] = {"do_sample": False}
    if not sampling.is_greedy:
        # top_k 0 and top_p 1 turn off transformers' own defaults (top_k 50).
        how = {"do_sample": True, "temperature": temperature}
        how |= {"top_k": top_k or 0, "top_p": 1.0 if top_p is None else top_p}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            eos_token_id=list(ends) or None,
            pad_token_id=_FILL,
            **how,
        )
    new_ids = output[:, length:].tolist()
    return [
        prompt + _continuation(tokenizer, ids, list(takewhile(lambda i: i not in ends, new)))
        for prompt, ids, new in zip(prompts, encoded, new_ids, strict=True)
    ]


def _continuation(tokenizer: Any, prompt_ids: list[int], new_ids: list[int]) -> str:
    """The text of the new tokens.

    They are decoded together with the prompt, because some tokenizers drop a space at the start of a text.
    """
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    after = tokenizer.decode(prompt_ids + new_ids, skip_special_tokens=True)
    if after.startswith(before):
        return after[len(before) :]
    return tokenizer.decode(new_ids, skip_special_tokens=True)


def _check_folder(folder: Path) -> Any:
    """Checks that a folder has all files that generation needs. Returns its configuration."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: give a folder made by `megatron-ladder export`")
    has_config = (folder / "config.json").is_file()
    if not has_config or not any((folder / name).is_file() for name in _WEIGHTS):
        raise UserError(
            f"{folder} is not an exported model: make one with `megatron-ladder export RUN OUT`"
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no tokenizer ({name}): copy the model's there")
    return read_hf_config(folder)
