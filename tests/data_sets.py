"""Small data sets in the project's own format, made without data_prep."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np


def write_data_set(
    path: Path,
    *,
    vocab_size: int = 200,
    train_documents: int = 60,
    validation_documents: int = 12,
    document_length: int = 64,
    seed: int = 0,
    tokenizer: bytes = b"a tokenizer",
) -> Path:
    """Random documents that a model can learn something of: token i+1 is often token i plus one."""
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True)
    (path / "tokenizer.model").write_bytes(tokenizer)
    splits = {}
    for split, count in (("train", train_documents), ("validation", validation_documents)):
        if not count:
            continue
        documents = [_document(rng, vocab_size, document_length) for _ in range(count)]
        splits[split] = _write_split(path / split, documents)
    manifest = {
        "format": "megatron-ladder-data",
        "version": 1,
        "created_by": "tests",
        "tokenizer": {
            "kind": "sentencepiece",
            "file": "tokenizer.model",
            "sha256": hashlib.sha256(tokenizer).hexdigest(),
            "vocab_size": vocab_size,
            "eod_id": 2,
        },
        "dtype": "uint16",
        "splits": splits,
        "sources": [],
        "options": {},
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def _document(rng: np.random.Generator, vocab_size: int, length: int) -> np.ndarray:
    steps = np.where(rng.random(length) < 0.8, 1, rng.integers(0, vocab_size, length))
    tokens = 3 + np.cumsum(steps) % (vocab_size - 3)
    tokens[-1] = 2
    return tokens.astype(np.uint16)


def _write_split(prefix: Path, documents: list[np.ndarray]) -> dict[str, Any]:
    lengths = np.array([len(d) for d in documents], dtype="<i4")
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64) * 2]).astype("<i8")
    binary = prefix.with_suffix(".bin")
    index = prefix.with_suffix(".idx")
    binary.write_bytes(np.concatenate(documents).tobytes())
    header = b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + b"\x08"
    header += np.array([len(documents), len(documents) + 1], "<u8").tobytes()
    document_index = np.arange(len(documents) + 1, dtype="<i8")
    index.write_bytes(header + lengths.tobytes() + pointers.tobytes() + document_index.tobytes())
    part = {
        "documents": len(documents),
        "tokens": int(lengths.sum()),
        "bin_bytes": binary.stat().st_size,
        "sha256": hashlib.sha256(binary.read_bytes()).hexdigest(),
    }
    return {
        "documents": len(documents),
        "tokens": int(lengths.sum()),
        "text_bytes": int(lengths.sum()) * 4,
        "bin_bytes": binary.stat().st_size,
        "idx_bytes": index.stat().st_size,
        "idx_sha256": hashlib.sha256(index.read_bytes()).hexdigest(),
        "parts": [part],
    }
