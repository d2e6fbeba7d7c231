"""Two small tasks made from a data set's held-out text: they compare models without a download.

Items are cut from the text at words (runs of characters without white space). So they depend only on the
documents and the seed, and are the same for every tokenizer.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ladder.errors import UserError
from pretrain.evaluation.likelihood import Likelihood

CONTEXT_WORDS = 64
MIN_CONTEXT_WORDS = 8
CONTINUATION_WORDS = 12
CONTINUATION_CHARACTERS = (
    256  # the most: a "word" of encoded data can be longer than a model's context
)
CHOICES = 4
ITEMS = 500

Words = list[re.Match[str]]
Serves = Callable[[str, Words, int], bool]
Likelihoods = Callable[[Sequence[tuple[str, str]], str], list[Likelihood]]


@dataclass(frozen=True)
class Item:
    """A context, and texts that may follow it; `choices[answer]` is the one that does."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class _Place:
    """A place in a document: a word, with enough words before and after it."""

    document: int
    text: str
    words: Words
    number: int

    def context(self) -> str:
        """The text before the word: at most CONTEXT_WORDS words."""
        first = self.words[max(self.number - CONTEXT_WORDS, 0)].start()
        return self.text[first : self.words[self.number - 1].end()]

    def white_space(self) -> str:
        """The white space before the word. It belongs to what follows, as in most tokenizers' tokens."""
        return self.text[self.words[self.number - 1].end() : self.words[self.number].start()]


def last_word_items(texts: Sequence[str], count: int, seed: int) -> list[Item]:
    """Passages whose last word the model must find, in LAMBADA's form (arXiv 1606.06031), from any text.

    The word has at least three characters, all letters, and stands after one space. Unlike LAMBADA's words,
    it is not selected by its difficulty.
    """
    places = _places(texts, count, seed, 1, _is_plain_word)
    return [
        Item(place.context(), (place.white_space() + place.words[place.number].group(),), 0)
        for place in places
    ]


def continuation_items(texts: Sequence[str], count: int, seed: int) -> list[Item]:
    """Passages with four continuations: the true one, and pieces of three other documents.

    The form is HellaSwag's (arXiv 1905.07830), without its filtering by other models.
    """
    rng = np.random.default_rng([seed, 1])
    items = []
    for place in _places(texts, count, seed, CONTINUATION_WORDS, _is_short):
        others = _others(texts, place, rng)
        if len(others) < CHOICES - 1:
            continue
        answer = int(rng.integers(CHOICES))
        others.insert(answer, _piece(place.text, place.words, place.number))
        choices = tuple(place.white_space() + piece for piece in others)
        items.append(Item(place.context(), choices, answer))
    return items


def _is_plain_word(text: str, words: Words, i: int) -> bool:
    word = words[i].group()
    space = text[words[i - 1].end() : words[i].start()]
    return space == " " and len(word) > 2 and word.isalpha()


def _is_short(text: str, words: Words, i: int) -> bool:
    return len(_piece(text, words, i)) <= CONTINUATION_CHARACTERS


def _others(texts: Sequence[str], place: _Place, rng: np.random.Generator) -> list[str]:
    """CHOICES - 1 pieces of other documents, all different and none equal to the true one.

    Fewer where a hundred draws do not give as many.
    """
    true = _piece(place.text, place.words, place.number)
    found: list[str] = []
    for number in rng.integers(len(texts), size=100):
        if number == place.document:
            continue
        words = _words(texts[number])
        if len(words) < CONTINUATION_WORDS:
            continue
        start = int(rng.integers(len(words) - CONTINUATION_WORDS + 1))
        piece = _piece(texts[number], words, start)
        if piece != true and piece not in found and _is_short(texts[number], words, start):
            found.append(piece)
        if len(found) == CHOICES - 1:
            break
    return found


def _piece(text: str, words: Words, first: int) -> str:
    return text[words[first].start() : words[first + CONTINUATION_WORDS - 1].end()]


def _places(
    texts: Sequence[str], count: int, seed: int, after: int, serves: Serves
) -> Iterator[_Place]:
    """At most `count` places, from as many different documents as possible.

    Args:
        after: the number of words that the document must have from the place on, the place's own included.
        serves: says whether the word with this number may be a place.
    """
    rng = np.random.default_rng([seed, 0])
    # Not all documents are tried: most may be too short, and reading them all would take long.
    order = rng.permutation(len(texts))[: 20 * count].tolist()
    places: dict[int, list[int]] = {}  # by document: numbers of words, in random order
    left = count
    for turn in range(count):  # one place of each document, then a second one of each, ...
        before = left
        for document in order:
            text = texts[document]
            words = _words(text)
            if turn == 0:
                able = [
                    i
                    for i in range(MIN_CONTEXT_WORDS, len(words) - after + 1)
                    if serves(text, words, i)
                ]
                places[document] = rng.permutation(able)[:count].tolist()
            if turn < len(places[document]):
                left -= 1
                yield _Place(document, text, words, places[document][turn])
            if not left:
                return
        if left == before:
            return


@functools.lru_cache(maxsize=32)
def _words(text: str) -> Words:
    return list(re.finditer(r"\S+", text))


def run_task(
    name: str, texts: Sequence[str], count: int, seed: int, likelihoods: Likelihoods
) -> dict[str, Any]:
    """Makes a task's items and measures a model on them.

    Args:
        name: last_word or continuation.
        texts: the documents.
        count: the most items to make.
        seed: of the items' random choice.
        likelihoods: the model: from (context, continuation) pairs, and a title for the progress bar, to
            the likelihoods of the continuations.

    Returns:
        A result as results.py writes it: metrics with standard errors, the number of items, the first item.

    Raises:
        UserError: no item can be made from the documents.
    """
    make = last_word_items if name == "last_word" else continuation_items
    items = make(texts, count, seed)
    if not items:
        least = MIN_CONTEXT_WORDS + (1 if name == "last_word" else CONTINUATION_WORDS)
        raise UserError(
            f"task {name}: none of the documents that were tried can be used. Give a data set with "
            f"documents of at least {least} words"
            + ("" if name == "last_word" else ", and at least two such documents")
        )
    pairs = [(item.context, choice) for item in items for choice in item.choices]
    found = iter(likelihoods(pairs, name))
    of_items = [[next(found) for _ in item.choices] for item in items]
    metrics = (_last_word if name == "last_word" else _continuation)(items, of_items)
    first = items[0]
    example = {"context": first.context, "choices": list(first.choices), "answer": first.answer}
    return {"task": name, "metrics": metrics, "items": len(items), "seed": seed, "example": example}


def _last_word(items: list[Item], found: list[list[Likelihood]]) -> dict[str, float | None]:
    mean = sum(likelihood.nats for (likelihood,) in found) / len(found)
    return _accuracy([likelihood.is_greedy for (likelihood,) in found]) | {
        "perplexity": math.exp(min(mean, 700.0))  # per word
    }


def _continuation(items: list[Item], found: list[list[Likelihood]]) -> dict[str, float | None]:
    right = []
    for item, likelihoods in zip(items, found, strict=True):
        a_byte = [
            likelihood.nats / len(choice.encode())
            for likelihood, choice in zip(likelihoods, item.choices, strict=True)
        ]
        right.append(int(np.argmin(a_byte)) == item.answer)
    return _accuracy(right)


def _accuracy(right: list[bool]) -> dict[str, float | None]:
    count, share = len(right), sum(right) / len(right)
    stderr = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
    return {"accuracy": share, "accuracy_stderr": stderr}
