"""A needle in a haystack of local text: does a model find a sentence again, from how far and where?

The sentence says which word belongs to another, both drawn at random. It stands somewhere in a piece of the
data set's text. At the end of the prompt stands its beginning once more, and the model gives a probability
to each word that may follow. The prompt is as long as the place asks for, in the model's tokens.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from megatron_ladder.errors import UserError
from pretrain.evaluation.documents import Documents
from pretrain.evaluation.likelihood import split_ids

SENTENCE = "\nThe secret word of {} is"
LENGTHS = 5
"""The longest prompt, half of it, and so on."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How much of the haystack stands before the needle."""
CHOICES = 10
ITEMS = 250
MOST_WORDS = 2000
SAMPLE_TOKENS = 200_000


@dataclass(frozen=True)
class Needle:
    """One prompt, and the tokens of which the model must choose one."""

    length: int
    depth: float
    prompt: np.ndarray
    """int64 [length]."""
    choices: tuple[int, ...]
    answer: int
    key: str


@dataclass(frozen=True)
class Haystack:
    """The text that needles are hidden in, and the words that they are made of."""

    documents: Documents
    tokenizer: Tokenizer
    begin_ids: Sequence[int]
    """What stands before a text."""

    def needles(self, seq_length: int, count: int, seed: int) -> list[Needle]:
        """`count` needles, the places (a length and a depth) in turn.

        Args:
            seq_length: of the longest prompts, in tokens.

        Raises:
            UserError: the text is too short, has too few words of one token, or `seq_length` is too short.
        """
        ids, folder = self.documents.ids(), self.documents.folder.path
        words = self._words(ids, np.random.default_rng([seed, 2]))
        if len(words) <= CHOICES:
            raise UserError(
                f"needle: of the words of {folder} only {len(words)} are one token of its tokenizer; the "
                f"task takes more than {CHOICES}. Give a data set of other text"
            )
        lengths = [seq_length >> i for i in range(LENGTHS)]
        # At least half of a prompt is haystack: two sentences of twice the usual length fit in the rest.
        least = 8 * len(self._ids(SENTENCE.format("it")))
        places = [*itertools.product([n for n in lengths if n >= least], DEPTHS)]
        if not places:
            raise UserError(
                f"--seq-length {seq_length}: needle takes prompts of {least} tokens at least"
            )
        if len(ids) < seq_length:
            raise UserError(
                f"{folder}: its {self.documents.split} split has {len(ids):,} tokens, needle hides "
                f"sentences in {seq_length:,} of them: give more text, or a lower --seq-length"
            )
        return [
            self._needle(ids, words, *places[i % len(places)], np.random.default_rng([seed, 3, i]))
            for i in range(count)
        ]

    def _needle(
        self,
        ids: np.ndarray,
        words: list[tuple[str, int]],
        length: int,
        depth: float,
        rng: np.random.Generator,
    ) -> Needle:
        chosen = [words[i] for i in rng.choice(len(words), CHOICES + 1, replace=False)]
        key, choices = chosen[0][0], tuple(token for _, token in chosen[1:])
        answer = int(rng.integers(CHOICES))
        question = self._ids(SENTENCE.format(key))
        needle = [*question, choices[answer], *self._ids(".\n")]
        size = length - len(self.begin_ids) - len(needle) - len(question)
        start = int(rng.integers(len(ids) - size + 1))
        hay = ids[start : start + size].astype(np.int64)
        cut = round(depth * size)
        prompt = np.concatenate([self.begin_ids, hay[:cut], needle, hay[cut:], question])
        return Needle(length, depth, prompt.astype(np.int64), choices, answer, key)

    def _words(self, ids: np.ndarray, rng: np.random.Generator) -> list[tuple[str, int]]:
        """Words of the text that are one token after the question, and these tokens; in random order."""
        start = int(rng.integers(max(len(ids) - SAMPLE_TOKENS, 0) + 1))
        used = np.unique(ids[start : start + SAMPLE_TOKENS])
        question = SENTENCE.format("it")
        found: dict[str, int] = {}
        for token in rng.permutation(used)[: 5 * MOST_WORDS].tolist():
            word = self.tokenizer.decode([token]).strip()
            if not word.isalpha() or len(word) < 3 or word in found:
                continue
            before, after = split_ids(self.tokenizer, question, " " + word)
            if len(after) == 1 and before == self._ids(question):
                found[word] = after[0]
            if len(found) == MOST_WORDS:
                break
        return list(found.items())

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


@torch.no_grad()
def run_needle(
    model: Any, haystack: Haystack, seq_length: int, count: int, seed: int, batch_size: int
) -> dict[str, Any]:
    """Measures how often a model finds the needle.

    Args:
        model: a `LadderForCausalLM`.
        seq_length: of the longest prompts, in tokens.
        count: the number of prompts.

    Returns:
        A result as results.py writes it. `accuracy`: of CHOICES words the needle's is the likeliest.
        `exact_match`: it is the likeliest of all tokens. `gain`: the logarithm of its probability minus the
        other words', a mean, in nats. `by_place` has the same for each length and depth.

    Raises:
        UserError: as `Haystack.needles`.
    """
    needles = haystack.needles(seq_length, count, seed)
    right, exact, gain = np.zeros(count, bool), np.zeros(count, bool), np.zeros(count)
    for batch in _batches(needles, batch_size):
        prompts = torch.from_numpy(np.stack([needles[i].prompt for i in batch]))
        logits = model(prompts.to(model.device), use_cache=False, logits_to_keep=1).logits[:, -1]
        for i, row in zip(batch, logits.float().cpu(), strict=True):
            needle = needles[i]
            token = needle.choices[needle.answer]
            others = [choice for choice in needle.choices if choice != token]
            right[i] = int(row[list(needle.choices)].argmax()) == needle.answer
            exact[i] = int(row.argmax()) == token
            gain[i] = float(row[token] - row[others].mean())
    first = needles[0]
    decode = haystack.tokenizer.decode
    return {
        "task": "needle",
        "metrics": _shares(right, exact, gain),
        "by_place": _by_place(needles, right, exact, gain),
        "items": count,
        "seed": seed,
        "seq_length": seq_length,
        "example": {
            "context": decode(first.prompt.tolist(), False)[-1000:],
            "choices": [decode([token]) for token in first.choices],
            "answer": first.answer,
        },
    }


def _batches(needles: list[Needle], batch_size: int) -> Iterator[list[int]]:
    """Numbers of needles of one length, the longest first."""
    order = sorted(range(len(needles)), key=lambda i: -needles[i].length)
    total = sum(needle.length for needle in needles)
    with tqdm(total=total, desc="needle", unit="tok", unit_scale=True, disable=None) as progress:
        for length, group in itertools.groupby(order, key=lambda i: needles[i].length):
            some = list(group)
            for first in range(0, len(some), batch_size):
                batch = some[first : first + batch_size]
                yield batch
                progress.update(length * len(batch))


def _by_place(
    needles: list[Needle], right: np.ndarray, exact: np.ndarray, gain: np.ndarray
) -> list[dict[str, Any]]:
    places: dict[tuple[int, float], list[int]] = {}
    for i, needle in enumerate(needles):
        places.setdefault((needle.length, needle.depth), []).append(i)
    return [
        {"length": length, "depth": depth, "items": len(some)}
        | _shares(right[some], exact[some], gain[some])
        for (length, depth), some in sorted(places.items())
    ]


def _shares(right: np.ndarray, exact: np.ndarray, gain: np.ndarray) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, values in (("accuracy", right), ("exact_match", exact), ("gain", gain)):
        several = len(values) > 1
        found[name] = float(values.mean())
        found[f"{name}_stderr"] = (
            float(values.std(ddof=1) / len(values) ** 0.5) if several else None
        )
    return found
