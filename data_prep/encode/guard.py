"""Checks that the fast engine gives the reference's ids, before it is used.

characters.py knows in which characters the two differ: texts that hold one go to the reference. Then both
engines encode some hundred of the documents that are about to be tokenized, and two thousand made-up
strings of the tokenizer's own pieces, white space, control characters and all of Unicode. Where they still
differ, the reference does all the work.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.encode.characters import characters_of
from data_prep.encode.encoders import Encoder
from data_prep.encode.engines import (
    FastEngine,
    FastSource,
    LazyReference,
    ReferenceEngine,
    load_fast,
)
from data_prep.errors import UserError
from data_prep.parts.plan import Part
from data_prep.read.documents import read_segment
from data_prep.read.reading import BadLines, Reading

SAMPLED_PARTS = 8
SAMPLED_BYTES = 1 << 19
MADE_UP = 2000


@dataclass(frozen=True)
class Verdict:
    """Which engine to use."""

    fast: bool
    routed: tuple[str, ...]
    """The reference engine takes the texts that hold one of these strings: the fast one differs there."""
    report: str
    """A line to print: what was found."""
    source: FastSource | None = None
    """The tokenizer as FastEngine takes it."""
    characters: str = ""
    """The reference engine takes the texts that hold one of these characters too."""


def judge(
    tokenizer: Path, encoder: Encoder, eod_token: str | None, parts: list[Part], reading: Reading
) -> Verdict:
    """Compares the engines on a sample of the documents and on made-up strings."""
    reference = ReferenceEngine(encoder)
    groups = encoder.marks()
    lazy = LazyReference(tokenizer, eod_token)
    try:
        source = load_fast(tokenizer)
        FastEngine(source, (), lazy)
        # SentencePiece models have no tables of classes, and their normalization is SentencePiece's own.
        characters = (
            characters_of(json.loads(source.tokenizer)) if tokenizer.suffix == ".json" else ""
        )
        fast = FastEngine(source, (), lazy, characters)
    except (UserError, ImportError) as error:
        return Verdict(False, (), f"engine: {reference.name} ({error})")
    routed = tuple(
        mark
        for group in groups
        if differences(reference, fast, made_up(encoder, group))
        for mark in group
    )
    fast = FastEngine(source, routed, lazy, characters)
    texts = [*sample(parts, reading), *made_up(encoder, ())]
    plain = [text for text in texts if fast.takes(text)]
    if different := differences(reference, fast, plain):
        return Verdict(
            False,
            (),
            f"engine: {reference.name}; {fast.name} differs from it on {len(different):,} of "
            f"{len(plain):,} texts, such as {different[0][:60]!r}",
        )
    others = [_few(routed)] if routed else []
    if characters:
        others.append(f"one of {len(characters):,} rare characters")
    to_reference = f"; texts with {' or '.join(others)} go to {reference.name}" if others else ""
    return Verdict(
        True,
        routed,
        f"engine: {fast.name}, same ids as {reference.name} on {len(plain):,} texts{to_reference}",
        source,
        characters,
    )


def _few(marks: tuple[str, ...]) -> str:
    shown = " ".join(repr(mark) for mark in marks[:3])
    return shown if len(marks) <= 3 else f"{shown} and {len(marks) - 3} more such pieces"


def differences(reference: ReferenceEngine, fast: FastEngine, texts: list[str]) -> list[str]:
    """The texts whose ids differ."""
    expected, lengths = reference.encode(texts)
    found, found_lengths = fast.encode(texts)
    if np.array_equal(lengths, found_lengths) and np.array_equal(expected, found):
        return []
    return [
        text
        for text, a, b in zip(
            texts,
            np.split(expected, np.cumsum(lengths)[:-1]),
            np.split(found, np.cumsum(found_lengths)[:-1]),
            strict=True,
        )
        if not np.array_equal(a, b)
    ]


def sample(parts: list[Part], reading: Reading) -> Iterator[str]:
    """Documents of parts from all over the input. Errors are ignored: the work itself meets them again."""
    step = max(1, len(parts) // SAMPLED_PARTS)
    chosen = parts[::step][:SAMPLED_PARTS]
    for part in chosen:
        taken = 0
        bad = BadLines(limit=1 << 62)
        try:
            for segment in part.segments:
                for texts in read_segment(segment, reading, bad, lambda _: None):
                    for text in texts:
                        if taken + len(text) <= SAMPLED_BYTES // len(chosen):
                            yield text
                            taken += len(text)
                    break
                if taken * 2 >= SAMPLED_BYTES // len(chosen):
                    break
        except Exception:  # noqa: S112 (the work itself meets the same error, and names it)
            continue


def made_up(encoder: Encoder, marks: tuple[str, ...]) -> list[str]:
    """Strings that are hard to tokenize alike; with `marks`, each holds at least one of them."""
    chance = random.Random(0)  # noqa: S311 (nothing secret)
    every_mark = {mark for group in encoder.marks() for mark in group}
    some = (chance.randrange(encoder.vocab_size) for _ in range(2 * MADE_UP))
    pieces = [encoder.piece(i).replace("▁", " ") for i in some]
    pieces = [p for p in pieces if p and p not in every_mark] or [" "]
    odd = [
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "\0",
        "▁",
        "\u00a0",
        "\u200d",
        "e\u0301",
        "ﬁ",
        "🙂",
        "日本",
    ]
    letters = "aZ09'.,-_/"

    def character() -> str:
        code = chance.choice(
            (
                chance.randrange(32, 127),
                chance.randrange(1, 0x3000),
                chance.randrange(0xE000, 0x1FFFF),
            )
        )
        return chr(code) if not 0xD800 <= code < 0xE000 else "?"

    makers = (
        character,
        lambda: chance.choice(pieces),
        lambda: chance.choice(odd),
        lambda: chance.choice(letters) + chance.choice((" ", "")),
    )
    strings = []
    for number in range(MADE_UP if not marks else 20 * len(marks[:100])):
        one = chance.choice(makers)
        parts = [
            (one if chance.random() < 0.8 else chance.choice(makers))()
            for _ in range(chance.randrange(1, 40))
        ]
        if marks:
            parts.insert(chance.randrange(len(parts) + 1), marks[number % len(marks)])
        strings.append("".join(parts))
    return strings
