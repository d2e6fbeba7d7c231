"""Tokenizers of several sizes, trained on a text, and what was tokenized with them."""

import hashlib
import json
from pathlib import Path

import orjson


def vocabularies(sizes: list[int], work: Path, text: Path) -> dict[int, Path]:
    """Byte-level BPE with Llama 3's pattern. The merges of a small one are the first of the largest."""
    import tokenizers
    from tokenizers import pre_tokenizers as pre

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    model = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    split = pre.Split(tokenizers.Regex(pattern), "isolated")
    model.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(False, use_regex=False)])
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=max(sizes) - 1, initial_alphabet=alphabet, show_progress=False
    )
    lines = (orjson.loads(line)["text"] for line in text.open("rb").readlines()[::2])
    model.train_from_iterator(lines, trainer)
    whole = json.loads(model.to_str())
    found = {}
    for size in sizes:
        some = json.loads(model.to_str())
        in_order = sorted(whole["model"]["vocab"].items(), key=lambda item: item[1])
        some["model"]["vocab"] = dict(in_order[: size - 1])
        some["model"]["merges"] = whole["model"]["merges"][: size - 1 - len(alphabet)]
        small = tokenizers.Tokenizer.from_str(json.dumps(some))
        small.add_special_tokens(["<|end_of_text|>"])
        found[size] = work / f"llama-3-{size}.json"
        small.save(str(found[size]))
    return found


def digests(folder: Path) -> tuple[str, ...]:
    names = ("train.bin", "train.idx")
    return tuple(hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names)
