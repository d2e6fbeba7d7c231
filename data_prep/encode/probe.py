"""Compares the engines on every character of Unicode, by tokenizers made for that.

A probe has the normalizer and the pre-tokenizer of a tokenizer.json, and a vocabulary that shows where
words end: any two bytes of neighbouring characters merge, unless a word ends between them.
"""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers

# Characters before and after the one that is tried. They tell all classes apart that patterns use:
# letters with their case, marks, digits, punctuation, white space.
AROUND = (
    ("a", "."),
    ("a", "a"),
    ("1", "1"),
    (".", "."),
    (" ", " "),
    ("A", "a"),
    ("a", "A"),
    ("'", "a"),
    ("a", "'s"),
    (".", "\r"),
    ("\u4e2d", "\u4e2d"),
    ("\u0301", "a"),
)
FEW = 1  # of those for planes in which no character is assigned, and for private use
# The same for normalizers: they order marks by their classes, from 1 (U+0334) to 240 (U+0345).
AROUND_MARKS = (
    ("a\u0301", "a"),
    ("a", "\u0301"),
    ("a", "\u0323"),
    ("a", "\u0334"),
    ("\u0345", "a"),
)
ASSIGNED = (range(1, 0x40000), range(0xE0000, 0xE1000))
OTHERS = (range(0x40000, 0xE0000), range(0xE1000, 0x110000))
# Two characters that NFC makes one of, since Unicode 9. There are none else: tests/unit/data_prep/encode/
# test_characters.py tries all pairs.
COMPOSED = (
    "\U00011935\U00011930",
    "\U000105d2\u0307",
    "\U000105da\u0307",
    "\U00011382\U000113c9",
    "\U00011384\U000113bb",
    "\U0001138b\U000113c2",
    "\U00011390\U000113c9",
    "\U000113c2\U000113c2",
    "\U000113c2\U000113b8",
    "\U000113c2\U000113c9",
    "\U0001611e\U0001611e",
    "\U0001611e\U00016129",
    "\U0001611e\U0001611f",
    "\U00016129\U0001611f",
    "\U0001611e\U00016120",
    "\U0001611e\U00016123",
    "\U0001611e\U00016124",
    "\U0001611e\U00016125",
    "\U00016121\U0001611f",
    "\U00016122\U0001611f",
    "\U00016121\U00016120",
    "\U00016d67\U00016d67",
    "\U00016d63\U00016d67",
    "\U00016d63\U00016d68",
    "\U00016d69\U00016d67",
)
AT_ONCE = 256


def different_characters(tokenizer: dict[str, Any]) -> list[int]:
    """Code points around which gigatoken and tokenizers give different ids, in order.

    Takes about 10 CPU-seconds, on all cores.

    Args:
        tokenizer: a tokenizer.json.

    Raises:
        Exception: gigatoken does not know this normalizer or pre-tokenizer.
    """
    from gigatoken.gigatoken_rs import load_hf_json

    source = json.dumps({**tokenizer, **_probe(tokenizer)})
    reference, fast = tokenizers.Tokenizer.from_str(source), load_hf_json(source.encode())

    def same(texts: list[str]) -> Iterator[bool]:
        found = reference.encode_batch_fast(texts, add_special_tokens=False)
        for text, encoded in zip(texts, found, strict=True):
            yield np.array_equal(fast.encode(text), np.array(encoded.ids, np.uint32))

    different: set[int] = set()
    contexts_of_assigned = AROUND + (AROUND_MARKS if tokenizer.get("normalizer") else ())
    for characters, contexts in ((ASSIGNED, contexts_of_assigned), (OTHERS, AROUND[:FEW])):
        # An end of a line stands between those that are tried; surrogates are no characters.
        codes = [c for c in itertools.chain(*characters) if c != 10 and not 0xD800 <= c < 0xE000]
        for many in _cut(codes, AT_ONCE * 64):
            blocks = _cut(many, AT_ONCE)
            for left, right in contexts:
                texts = ["\n".join(f"{left}{chr(c)}{right}" for c in block) for block in blocks]
                for block, equal in zip(blocks, same(texts), strict=True):
                    if not equal:
                        alone = same([f"{left}{chr(c)}{right}\n" for c in block])
                        different |= {c for c, e in zip(block, alone, strict=True) if not e}
    pairs = zip(COMPOSED, same(list(COMPOSED)), strict=True)
    return sorted(different | {ord(pair[0]) for pair, equal in pairs if not equal})


def _cut(codes: list[int], size: int) -> list[list[int]]:
    return [codes[i : i + size] for i in range(0, len(codes), size)]


def _probe(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What is in a probe instead of the tokenizer's own."""
    model = {**tokenizer["model"], "dropout": None, "ignore_merges": False, "merges": []}
    if model.get("byte_fallback"):
        pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
        model |= {"vocab": {piece: i for i, piece in enumerate(pieces)}, "unk_token": "<unk>"}
    else:
        names = byte_names()
        vocab = {names[byte]: byte for byte in range(256)}
        # No end of a line merges: it stands between the characters that are tried.
        last = [byte for byte in range(0xC0) if byte != 10]
        first = [byte for byte in (*range(0x80), *range(0xC2, 0xF5)) if byte != 10]
        merges = [[names[a], names[b]] for a in last for b in first]
        vocab |= {a + b: 256 + i for i, (a, b) in enumerate(merges)}
        model |= {"vocab": vocab, "merges": merges, "unk_token": None}
    return {"model": model, "added_tokens": [], "post_processor": None, "decoder": None}


def byte_names() -> dict[int, str]:
    """How byte-level vocabularies write bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {byte: chr(byte) for byte in plain}
    others = (byte for byte in range(256) if byte not in names)
    return names | {byte: chr(256 + i) for i, byte in enumerate(others)}
