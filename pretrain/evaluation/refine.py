"""The refine task: what a model writes after the prompts of instruction data, scored against the answers.

Made for refining translations (arXiv 2406.15741): a prompt has a source and a draft, and the answer is the
reference. It takes any data set of prompts and answers.
"""

import importlib.util
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from megatron_ladder.errors import UserError
from pretrain.convert.model_text import ModelText, load_tokenizer
from pretrain.evaluation.documents import Documents

RESAMPLED = 1000
"""Bootstrap samples of a standard error."""
MORE_TOKENS = 32
"""A text may have so many tokens more than its prompt, which holds a source and a draft of it."""
EXAMPLES = 5


@dataclass(frozen=True)
class Item:
    """A prompt and the text that a model is to write after it."""

    prompt: list[int]
    """Token ids, from the document's beginning."""
    text: str
    """The prompt's text."""
    fields: dict[str, str]
    """What the prompt's template was filled with; empty for a data set without a template."""
    reference: str


def check_scorer() -> None:
    """Raises UserError when sacrebleu is not installed."""
    if importlib.util.find_spec("sacrebleu") is None:
        raise UserError("refine scores with sacrebleu: pip install 'megatron-ladder[refine]'")


def run_refine(
    model: Any,
    text: ModelText,
    documents: Documents,
    seq_length: int,
    count: int | None,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """Lets the model write after each prompt, by the likeliest token each time, and scores the texts.

    Args:
        model: a `LadderForCausalLM`.
        text: where its texts end.
        documents: instruction data, made with the model's tokenizer.
        count: the most items, drawn at random by `seed`; None: all.

    Returns:
        A result as results.py writes it. `bleu` and `chrf` are sacrebleu's, 0 to 100, of the model's texts
        against the answers; `NAME_bleu` and `NAME_chrf` are those of the prompt's field NAME, as if it were
        what the model had written. Standard errors are by bootstrap over the items. `cut_off` is the share
        of texts that the model had not ended after as many tokens as the prompt has, and 32.

    Raises:
        UserError: it is no instruction data, or a prompt does not fit the model's context.
    """
    items = items_of(documents, count, seed)
    for item in items:
        if len(item.prompt) >= seq_length:
            raise UserError(
                f"refine: a prompt of {documents.folder.path} has {len(item.prompt):,} tokens, and "
                f"--seq-length {seq_length:,} leaves no room for what follows it"
            )
    written = _written(model, [item.prompt for item in items], text.end_ids, seq_length, batch_size)
    texts = [text.tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in written]
    references = [item.reference for item in items]
    metrics, signatures = _scores(texts, references)
    for name in items[0].fields:
        found, _ = _scores([item.fields[name] for item in items], references)
        metrics |= {f"{name}_{metric}": value for metric, value in found.items()}
    metrics["cut_off"] = sum(not ended for _, ended in written) / len(items)
    examples = [
        {"prompt": item.text, "written": one, "reference": item.reference}
        for item, one in zip(items[:EXAMPLES], texts, strict=False)
    ]
    return {
        "task": "refine",
        "metrics": metrics,
        "items": len(items),
        "seed": None if len(items) == len(documents) else seed,
        "signatures": signatures,
        "examples": examples,
    }


def items_of(documents: Documents, count: int | None, seed: int) -> list[Item]:
    """The documents as prompts and answers.

    Raises:
        UserError: one is no prompt with an answer, or is not what the data set's template gives.
    """
    path, trained = documents.folder.path, documents.trained()
    if trained is None:
        raise UserError(
            f"refine: {path} has no loss mask: give instruction data, made by `megatron-ladder data "
            "tokenize --answer-field`"
        )
    tokenizer = load_tokenizer(path / documents.folder.tokenizer["file"])
    template = _template(documents)
    bos_id = documents.folder.tokenizer.get("bos_id")
    ends = np.cumsum(np.diff(documents.ends)[documents.numbers])
    ids, begins = documents.ids(), np.concatenate([[0], ends[:-1]])
    chosen = np.arange(len(ends))
    if count is not None and count < len(ends):
        chosen = np.sort(np.random.default_rng(seed).permutation(chosen)[:count])
    found = []
    for number in chosen.tolist():
        some = ids[begins[number] : ends[number]].tolist()
        mask = trained[begins[number] : ends[number]]
        length = int(np.argmax(mask))
        if not length or not mask[length:].all():
            raise UserError(
                f"refine: document {number} of {path} is not one prompt and one answer after it"
            )
        prompt = some[:length]
        text = tokenizer.decode(prompt[1:] if prompt[0] == bos_id else prompt, False)
        fields: dict[str, str] = {}
        if template is not None:
            values = told_apart(text, [literal for literal, _ in template])
            if values is None:
                raise UserError(
                    f"refine: what the fields of document {number} of {path} hold cannot be told from its "
                    "prompt: tokenize again with a --prompt-template whose text between the fields does "
                    "not occur in them"
                )
            fields = dict(zip([name for _, name in template if name], values, strict=True))
        reference = tokenizer.decode(some[length:-1], skip_special_tokens=True)
        found.append(Item(prompt, text, fields, reference))
    return found


def _template(documents: Documents) -> list[tuple[str, str]] | None:
    """The prompt's template, as pieces of text, each with the field after it ("": none is); None: there is
    no template.

    Raises:
        UserError: it is not valid.
    """
    options = documents.folder.manifest.get("options")
    chat = options.get("chat") if isinstance(options, dict) else None
    prompt = chat.get("prompt") if isinstance(chat, dict) else None
    if prompt is None:
        return None
    try:
        parts = [(text, name or "") for text, name, _, _ in string.Formatter().parse(prompt)]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{documents.folder.path / 'manifest.json'}: options.chat.prompt is no template of a prompt: "
            f"{error}"
        ) from error
    return parts if parts and not parts[-1][1] else [*parts, ("", "")]


def told_apart(text: str, literals: Sequence[str]) -> list[str] | None:
    """What stands between the literals of a template, in a text made by it.

    Args:
        literals: they stand in the text in this order; the first one begins it and the last one ends it.

    Returns:
        The values, one less than literals. None: there is none, or more than one way.
    """
    first, *between = literals
    if not between:
        return [] if text == first else None
    last = between.pop()
    end = len(text) - len(last)
    if not (text.startswith(first) and text.endswith(last) and end >= len(first)):
        return None
    earliest, at = [], len(first)
    for literal in between:
        if (found := text.find(literal, at, end)) < 0:
            return None
        earliest.append(found)
        at = found + len(literal)
    at = end
    for literal, place in zip(reversed(between), reversed(earliest), strict=True):
        if (at := text.rfind(literal, len(first), at)) != place:
            return None
    begins = [len(first), *(p + len(t) for p, t in zip(earliest, between, strict=True))]
    return [text[b:e] for b, e in zip(begins, [*earliest, end], strict=True)]


@torch.no_grad()
def _written(
    model: Any,
    prompts: Sequence[list[int]],
    end_ids: tuple[int, ...],
    seq_length: int,
    batch_size: int,
) -> list[tuple[list[int], bool]]:
    """What the model writes after each prompt, without the end token, and whether it ended it."""
    if not end_ids:
        raise UserError("refine: no token ends a text of this model")
    largest = max(max(ids) for ids in prompts)
    if largest >= model.config.vocab_size:
        raise UserError(
            f"refine: a prompt has the token id {largest:,}, the model has no row for it"
        )
    # In a batch the longest prompt goes on beyond the context, and is cut there.
    transformers_logging.set_verbosity_error()
    found: dict[int, tuple[list[int], bool]] = {}
    most = [min(len(ids) + MORE_TOKENS, seq_length - len(ids)) for ids in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    with tqdm(total=len(order), desc="refine", unit="text", disable=None) as progress:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            length = len(prompts[batch[0]])
            padding = [length - len(prompts[i]) for i in batch]
            rows = [[0] * p + prompts[i] for p, i in zip(padding, batch, strict=True)]
            seen = [[0] * p + [1] * (length - p) for p in padding]
            output = model.generate(
                torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(seen, device=model.device),
                max_new_tokens=max(most[i] for i in batch),
                do_sample=False,
                eos_token_id=list(end_ids),
                pad_token_id=end_ids[0],
            )
            for i, new in zip(batch, output[:, length:].tolist(), strict=True):
                kept = list(takewhile(lambda token: token not in end_ids, new[: most[i]]))
                found[i] = kept, len(kept) < min(most[i], len(new))
            progress.update(len(batch))
    return [found[i] for i in range(len(prompts))]


def _scores(
    texts: list[str], references: list[str]
) -> tuple[dict[str, float | None], dict[str, str]]:
    """BLEU and chrF with standard errors, and sacrebleu's signatures of both."""
    from sacrebleu.metrics import BLEU, CHRF

    values: dict[str, float | None] = {}
    signatures = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        times = RESAMPLED if len(texts) > 1 else 1
        score = metric.corpus_score(texts, [references], n_bootstrap=times)
        signatures[name] = metric.get_signature().format()
        facts = json.loads(score.format(is_json=True, signature=signatures[name]))
        # sacrebleu gives half the width of the 95 % interval.
        width = facts.get("confidence_var")
        values |= {name: score.score, f"{name}_stderr": None if width is None else width / 1.96}
    return values, signatures
