"""Characters that the fast engine reads otherwise than the reference: texts with one go to the reference.

gigatoken and tokenizers have tables of different versions of Unicode. Which characters that concerns
depends on their versions, the normalizer and the pre-tokenizer. characters.json has it for the usual ones
(`python scripts/characters.py` writes it); otherwise all characters are compared.
"""

import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("characters.json")


def characters_of(tokenizer: dict[str, Any]) -> str:
    """The characters that the engines read otherwise with a tokenizer.json, in order.

    Raises:
        Exception: gigatoken does not know this kind of tokenizer.
    """
    known = json.loads(TABLE.read_text(encoding="utf-8")).get(versions(), {}).get(cut_by(tokenizer))
    if known is not None:
        return "".join(map(chr, from_ranges(known)))
    from data_prep.encode.probe import different_characters

    print(
        f"comparing all characters of {versions()}, which characters.json does not have with this "
        "pattern: some ten seconds of a core ...",
        file=sys.stderr,
        flush=True,
    )
    return "".join(map(chr, different_characters(tokenizer)))


def versions() -> str:
    return f"gigatoken {version('gigatoken')}, tokenizers {version('tokenizers')}"


def cut_by(tokenizer: dict[str, Any]) -> str:
    """What decides how a tokenizer.json reads characters: normalizer, pre-tokenizer, byte fallback."""
    steps = [
        _step(step)
        for whole in ("normalizer", "pre_tokenizer")
        for step in _steps(tokenizer.get(whole))
    ]
    if tokenizer["model"].get("byte_fallback"):
        steps.append("byte fallback")
    return "; ".join(steps)


def _steps(whole: dict[str, Any] | None) -> list[dict[str, Any]]:
    if whole is None:
        return []
    inner = whole.get("normalizers", whole.get("pretokenizers"))
    return [whole] if inner is None else [step for one in inner for step in _steps(one)]


def _step(step: dict[str, Any]) -> str:
    # They decide about spaces and offsets alone, or are the defaults that old files leave out.
    without = ("type", "add_prefix_space", "trim_offsets", "prepend_scheme")
    facts = {key: value for key, value in sorted(step.items()) if key not in without}
    for key, default in (("use_regex", True), ("invert", False), ("behavior", "Isolated")):
        if facts.get(key) == default:
            del facts[key]
    if len(charsmap := facts.get("precompiled_charsmap", "")) > 0:
        facts["precompiled_charsmap"] = hashlib.sha256(charsmap.encode()).hexdigest()[:16]
    return f"{step['type']} {json.dumps(facts)}" if facts else str(step["type"])


def to_ranges(codes: list[int]) -> str:
    """Code points, in order, as `88f 10940-10959`."""
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return " ".join(f"{a:x}" if a == b else f"{a:x}-{b:x}" for a, b in ranges)


def from_ranges(ranges: str) -> list[int]:
    codes: list[int] = []
    for one in ranges.split():
        first, _, last = one.partition("-")
        codes += range(int(first, 16), int(last or first, 16) + 1)
    return codes
