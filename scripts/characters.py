"""Writes data_prep/encode/characters.json for the installed versions of gigatoken and tokenizers.

    python scripts/characters.py

It takes some minutes. What is there for other versions stays.
"""

import json
from typing import Any

from data_prep.encode.characters import TABLE, cut_by, to_ranges, versions
from data_prep.encode.probe import different_characters

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
OTHER = r"[^\r\n\p{L}\p{N}]?"
CASED = f"{OTHER}[{UPPER}]*[{LOWER}]+%s|{OTHER}[{UPPER}]+[{LOWER}]*%s"
PATTERNS = {
    "Llama 3, Olmo": rf"{CONTRACTIONS}|{OTHER}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{ENDS}",
    "GPT-4": (
        rf"{CONTRACTIONS}|{OTHER}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|"
        r"\s+(?!\S)|\s+"
    ),
    "GPT-4 in tiktoken": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
        r"\s++$|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    "Qwen 2 and 3": rf"{CONTRACTIONS}|{OTHER}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{ENDS}",
    "Qwen 3.5": (
        rf"{CONTRACTIONS}|{OTHER}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{ENDS}"
    ),
    "GPT-4o": (
        f"{CASED % (CONTRACTIONS + '?', CONTRACTIONS + '?')}"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{ENDS}"
    ),
    "Nemotron": rf"{CASED % ('', '')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{ENDS}",
}
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
    " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)


def split(*patterns: str) -> dict[str, Any]:
    splits = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, {**byte_level, "trim_offsets": True}]}


def tokenizers() -> list[dict[str, Any]]:
    """One for each way to cut text that gigatoken knows, with the normalizer that models use it with."""
    gpt_2 = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    byte_level = [gpt_2, *map(split, PATTERNS.values()), split(*DEEPSEEK)]
    with_nfc = [split(PATTERNS[name]) for name in ("Qwen 2 and 3", "Qwen 3.5")]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    llama_2 = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]}
    metaspace = {
        "type": "Metaspace",
        "replacement": "\u2581",
        "prepend_scheme": "first",
        "split": False,
    }
    gemma = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    with_bytes = [(llama_2, None), (None, metaspace), (space, gemma), (space, None)]
    model: dict[str, Any] = {"type": "BPE", "fuse_unk": False}
    return [
        {"version": "1.0", "normalizer": normalizer, "pre_tokenizer": cut, "model": model}
        for normalizer, cuts in ((None, byte_level), ({"type": "NFC"}, with_nfc))
        for cut in cuts
    ] + [
        {
            "normalizer": n,
            "pre_tokenizer": p,
            "model": {**model, "byte_fallback": True, "fuse_unk": True},
        }
        for n, p in with_bytes
    ]


def main() -> None:
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[versions()] = found = {}
    for tokenizer in tokenizers():
        codes = different_characters(tokenizer)
        found[cut_by(tokenizer)] = to_ranges(codes)
        print(f"{len(codes):5} {cut_by(tokenizer)[:90]}", flush=True)
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
