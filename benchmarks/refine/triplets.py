"""Triplets of source, draft and reference from the message catalogues that Django and Wagtail ship.

    pip install polib==1.2.0 && pip install --no-deps django==5.2.19 wagtail==8.0.1
    python benchmarks/refine/triplets.py --output-dir DIR

A source is an English message, its reference the Brazilian translation. The drafts are what translators of
a related language made of the same message: European Portuguese, Galician and Spanish. They stand for the
drafts of three systems, a good one and two worse ones.

Writes `train.jsonl` and `held-out.jsonl` (`source`, `draft`, `reference`), `base.jsonl` for a model to
begin with, and `tokenizer.jsonl`, the text of both kinds of training. The base triplets are of the six
other languages: each draft is its own reference, spoiled by rule. A model learns from them to copy and to
mend, and sees no Brazilian Portuguese.

A message is held out with all of its translations. What is like a held-out message, in English or in
Brazilian Portuguese, is left out of all other files.
"""

import argparse
import hashlib
import importlib.util
import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path

import polib

PACKAGES = ("django", "wagtail")
TARGET = "Brazilian Portuguese"
# The folders of a language's catalogues; Django and Wagtail do not name all of them alike.
DRAFTS = {"Portuguese": ("pt", "pt_PT"), "Galician": ("gl",), "Spanish": ("es",)}
OTHERS = {"Catalan": ("ca",), "French": ("fr",), "Italian": ("it",)}
HELD_OUT = 0.12
"""The share of messages that are held out, before those like them are left out."""
LIKE = 0.5
"""Two texts are alike when they share so much of all their runs of three characters."""
MOST_CHARACTERS = 200
SEED = 1

Messages = dict[str, dict[str, str]]
"""By the English text: its translations by language; the first one where there are several."""


def folders_of(packages: Iterable[str]) -> list[Path]:
    """Where installed packages lie. They are not imported.

    Raises:
        SystemExit: one is not installed.
    """
    found: list[Path] = []
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"{name} is not installed: pip install --no-deps {name}")
        found += map(Path, spec.submodule_search_locations)
    return found


def messages_of(folders: Iterable[Path]) -> Messages:
    """The messages of two words or more with a Brazilian translation, in English's alphabetical order."""
    found: Messages = {}
    languages = {TARGET: ("pt_BR",), **DRAFTS, **OTHERS}
    for folder, (language, names) in itertools.product(folders, languages.items()):
        for name in names:
            for file in sorted(folder.glob(f"**/locale/{name}/LC_MESSAGES/django*.po")):
                for english, text in _catalogue(file):
                    found.setdefault(english, {}).setdefault(language, text)
    return {
        english: found[english]
        for english in sorted(found)
        if TARGET in found[english] and len(english.split()) > 1
    }


def _catalogue(file: Path) -> Iterable[tuple[str, str]]:
    """English and translation of each message; of one with a plural, the plural."""
    for entry in polib.pofile(file).translated_entries():
        plurals = entry.msgstr_plural
        text = plurals[max(plurals)] if plurals else entry.msgstr
        english, text = (" ".join(t.split()) for t in (entry.msgid_plural or entry.msgid, text))
        if text and english and max(len(english), len(text)) <= MOST_CHARACTERS:
            yield english, text


def split(messages: Messages) -> tuple[Messages, Messages]:
    """Messages to train on, and those that are held out; none of the first is like any of the second."""
    held_out = {e: t for e, t in messages.items() if _draw(e) < HELD_OUT}
    kept = {e: t for e, t in messages.items() if _draw(e) >= HELD_OUT}
    for language in (None, TARGET):
        runs = [_runs(t.get(language, "") if language else e) for e, t in held_out.items()]
        kept = {
            e: t
            for e, t in kept.items()
            if not any(_are_alike(_runs(t[language] if language else e), other) for other in runs)
        }
    return kept, held_out


def _draw(english: str) -> float:
    """A number of [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(english.encode(), digest_size=4).digest()) / 2**32


def _runs(text: str) -> set[str]:
    text = f"  {text.lower()}  "
    return {text[i : i + 3] for i in range(len(text) - 2)}


def _are_alike(a: set[str], b: set[str]) -> bool:
    return len(a & b) >= LIKE * len(a | b)


def triplets(messages: Messages) -> list[dict[str, str]]:
    """A triplet for each draft that there is, in a fixed random order."""
    found = [
        {"source": english, "draft": texts[language], "reference": texts[TARGET]}
        for english, texts in messages.items()
        for language in DRAFTS
        if language in texts
    ]
    random.Random(SEED).shuffle(found)  # noqa: S311 (no secret)
    return found


def base_triplets(messages: Messages) -> list[dict[str, str]]:
    """A triplet for each message in each other language than the references', in a fixed random order."""
    drawn = random.Random(SEED)  # noqa: S311 (no secret)
    words: dict[str, list[str]] = {}
    for texts in messages.values():
        for language, text in texts.items():
            words.setdefault(language, []).extend(text.split())
    found = [
        {
            "language": language,
            "source": english,
            "draft": spoiled(text, words[language], drawn),
            "reference": text,
        }
        for english, texts in messages.items()
        for language, text in texts.items()
        if language != TARGET
    ]
    drawn.shuffle(found)
    return found


def spoiled(text: str, words: list[str], drawn: random.Random) -> str:
    """A text of whose words a tenth is left out, a tenth is another one of the language, and a tenth has
    changed places with the word before it."""
    left: list[str] = []
    for word in text.split():
        draw = drawn.random()
        if draw < 0.1:
            continue
        if draw < 0.2:
            left.append(drawn.choice(words))
        elif draw < 0.3 and left:
            left.insert(-1, word)
        else:
            left.append(word)
    return " ".join(left) or text


def write(folder: Path, packages: list[Path]) -> dict[str, int]:
    """Writes the folder with the four files; returns the number of lines of each."""
    kept, held_out = split(messages_of(packages))
    base, train = base_triplets(kept), triplets(kept)
    files = {
        "base": base,
        "train": train,
        "held-out": triplets(held_out),
        "tokenizer": [
            *({"text": f"{one['source']} {one['reference']}"} for one in base),
            *({"text": one["reference"]} for one in train),
        ],
    }
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (part / f"{name}.jsonl").write_text(text)
    part.replace(folder)
    return {name: len(lines) for name, lines in files.items()} | {
        "messages": len(kept),
        "messages held out": len(held_out),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    print(write(parser.parse_args().output_dir, folders_of(PACKAGES)))


if __name__ == "__main__":
    main()
