"""Whether the fields of a data set's manifest have values that a data set can have.

docs/reference/formats.md describes them. pretrain/data/manifests.py checks the same for training.
"""

import re
from typing import Any

from data_prep.errors import UserError
from data_prep.json_files import is_utf8, is_whole, is_word, short

# A manifest lists every input file and every part: this is about five million of them.
MOST_BYTES = 1 << 30
# By kind. Other names would let a manifest name files outside of its folder.
TOKENIZERS = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json"}
SPLITS = ("train", "validation", "test")
MOST = (1 << 63) - 1
MOST_IDS = 1 << 24
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_manifest(manifest: dict[str, Any], where: str) -> None:
    """Refuses fields that are missing or have impossible values.

    Args:
        where: the manifest's path, for messages.

    Raises:
        UserError: the first field that is wrong.
    """

    def need(right: bool, name: str, value: Any, wanted: str) -> None:
        if not right:
            raise UserError(
                f"{where} is not a data set's manifest: {name} is {short(value)}: it must be {wanted}"
            )

    dtype, sources = manifest.get("dtype"), manifest.get("sources")
    need(dtype in ("uint16", "int32"), "dtype", dtype, "uint16 or int32")
    need(isinstance(sources, list), "sources", sources, "a list")
    made_by = manifest.get("created_by")
    need(
        is_word(made_by) and is_utf8(str(made_by)),
        "created_by",
        made_by,
        "a program and its version",
    )
    tokenizer, splits = manifest.get("tokenizer"), manifest.get("splits")
    need(isinstance(tokenizer, dict), "tokenizer", tokenizer, "an object")
    assert isinstance(tokenizer, dict)
    kind, file, size = (tokenizer.get(key) for key in ("kind", "file", "vocab_size"))
    need(is_word(kind) and kind in TOKENIZERS, "tokenizer.kind", kind, " or ".join(TOKENIZERS))
    need(file == TOKENIZERS[str(kind)], "tokenizer.file", file, TOKENIZERS[str(kind)])
    need(is_whole(size, 1, MOST_IDS), "tokenizer.vocab_size", size, f"1 to {MOST_IDS:,}")
    assert isinstance(size, int)
    for key in ("eod_id", "bos_id"):
        if key == "eod_id" or key in tokenizer:
            value = tokenizer.get(key)
            need(is_whole(value, 0, size - 1), f"tokenizer.{key}", value, f"an id below {size:,}")
    digest = tokenizer.get("sha256")
    need(_is_sha256(digest), "tokenizer.sha256", digest, "a SHA-256 in hexadecimal")
    need(isinstance(splits, dict), "splits", splits, "an object")
    assert isinstance(splits, dict)
    for split, facts in splits.items():
        need(split in SPLITS, "a split", split, " or ".join(SPLITS))
        need(isinstance(facts, dict), f"splits.{split}", facts, "an object")
        _check_split(facts, f"splits.{split}", need)


def _check_split(facts: dict[str, Any], name: str, need: Any) -> None:
    least = {"documents": 1, "tokens": 1, "text_bytes": 0, "bin_bytes": 1, "idx_bytes": 1}
    for key in ("mask_bytes", "trained_tokens"):
        if key in facts:
            least[key] = 0
    for key, smallest in least.items():
        value = facts.get(key)
        need(is_whole(value, smallest, MOST), f"{name}.{key}", value, f"{smallest} or more")
    digest = facts.get("idx_sha256")
    need(digest is None or _is_sha256(digest), f"{name}.idx_sha256", digest, "a SHA-256")
    parts = facts.get("parts", [])
    need(isinstance(parts, list), f"{name}.parts", parts, "a list")
    for part in parts:
        right = isinstance(part, dict) and _is_sha256(part.get("sha256"))
        counts = [part.get(key) for key in ("documents", "tokens")] if right else []
        right = right and all(is_whole(count, 0, MOST) for count in counts)
        right = right and _is_sha256(part.get("mask_sha256", part["sha256"]))
        need(right, f"one of {name}.parts", part, "an object with counts and checksums")


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
