"""Looks into a data set: its figures, and any document as tokens and as text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from data_prep.dataset.folder import DataSet, open_data_set
from data_prep.dataset.shards import read_document
from data_prep.errors import UserError


@dataclass(frozen=True)
class Inspect:
    """Show a data set's figures, and a document as tokens and text."""

    data: tyro.conf.Positional[Path]
    """The data set's folder."""
    split: Literal["train", "validation", "test"] = "train"
    document: int | None = None
    """Which document to show, from 0; negative counts from the end. None shows the figures alone."""
    max_tokens: int = 100
    """Tokens of the document to show."""


def inspect(options: Inspect) -> str:
    """What to print.

    Raises:
        UserError: not a data set, or no such document.
    """
    if options.max_tokens < 1:
        raise UserError(f"--max-tokens {options.max_tokens}: show at least one")
    data = open_data_set(options.data)
    if problems := data.wrong_sizes():
        raise UserError(f"{problems[0]}: the data set is damaged, tokenize again")
    manifest = data.manifest
    facts = manifest["tokenizer"]
    lines = [
        f"{options.data}: made by {manifest['created_by']} from {len(manifest['sources'])} files",
        f"tokenizer {facts['file']} ({facts['kind']}), {facts['vocab_size']:,} ids, EOD "
        f"{facts['eod_id']}{_bos(facts)}; tokens are {manifest['dtype']}",
    ]
    for name, split in manifest["splits"].items():
        lines.append(
            f"{name:>10}: {split['documents']:,} documents, {split['tokens']:,} tokens, "
            f"{split['text_bytes'] / max(split['tokens'], 1):.2f} bytes a token"
        )
    if options.document is not None:
        lines += _document(options, data)
    return "\n".join(lines)


def _bos(facts: dict[str, Any]) -> str:
    return f", documents begin with BOS {facts['bos_id']}" if "bos_id" in facts else ""


def _document(options: Inspect, data: DataSet) -> list[str]:
    manifest = data.manifest
    split = manifest["splits"].get(options.split)
    count = split["documents"] if split else 0
    number = options.document or 0
    if not -count <= number < count:
        raise UserError(f"{options.data}: the {options.split} split has {count:,} documents")
    number %= count
    encoder = data.open_encoder()
    ids = read_document(options.data / options.split, number, manifest["dtype"], count).tolist()
    shown = ids[: options.max_tokens]
    more = f" (the first {len(shown)} of them)" if len(shown) < len(ids) else ""
    pieces = " ".join(f"{i}:{encoder.piece(i)!r}" for i in shown)
    facts = manifest["tokenizer"]
    text_ids = [i for i in shown if i not in (facts["eod_id"], facts.get("bos_id"))]
    title = f"{options.split} document {number}: {len(ids):,} tokens{more}"
    return ["", title, pieces, "", encoder.decode(text_ids)]
