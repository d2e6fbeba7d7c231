"""Looks into a data set: its figures, and any document as tokens and as text."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from data_prep.encoders import open_encoder, sha256
from data_prep.errors import UserError
from data_prep.shards import read_document


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
    manifest = _manifest(options.data)
    facts = manifest["tokenizer"]
    lines = [
        f"{options.data}: made by {manifest['created_by']} from {len(manifest['sources'])} files",
        f"tokenizer {facts['file']} ({facts['kind']}), {facts['vocab_size']:,} ids, EOD "
        f"{facts['eod_id']}; tokens are {manifest['dtype']}",
    ]
    for name, split in manifest["splits"].items():
        lines.append(
            f"{name:>10}: {split['documents']:,} documents, {split['tokens']:,} tokens, "
            f"{split['text_bytes'] / max(split['tokens'], 1):.2f} bytes a token"
        )
    if options.document is not None:
        lines += _document(options, manifest)
    return "\n".join(lines)


def _document(options: Inspect, manifest: dict[str, Any]) -> list[str]:
    split = manifest["splits"].get(options.split)
    count = split["documents"] if split else 0
    number = options.document or 0
    if not -count <= number < count:
        raise UserError(f"{options.data}: the {options.split} split has {count:,} documents")
    number %= count
    tokenizer = options.data / manifest["tokenizer"]["file"]
    if not tokenizer.is_file() or sha256(tokenizer) != manifest["tokenizer"]["sha256"]:
        raise UserError(f"{tokenizer} is not the tokenizer the data set was made with")
    # Any token may end documents in a tokenizer.json; decoding does not need to know which.
    encoder = open_encoder(tokenizer, _eod_token(tokenizer, manifest))
    ids = read_document(options.data / options.split, number, manifest["dtype"], count).tolist()
    shown = ids[: options.max_tokens]
    more = f" (the first {len(shown)} of them)" if len(shown) < len(ids) else ""
    pieces = " ".join(f"{i}:{encoder.piece(i)!r}" for i in shown)
    text_ids = [i for i in shown if i != manifest["tokenizer"]["eod_id"]]
    title = f"{options.split} document {number}: {len(ids):,} tokens{more}"
    return ["", title, pieces, "", encoder.decode(text_ids)]


def _eod_token(tokenizer: Path, manifest: dict[str, Any]) -> str | None:
    if tokenizer.suffix == ".model":
        return None
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(tokenizer)).id_to_token(
        manifest["tokenizer"]["eod_id"]
    )


def _manifest(data: Path) -> dict[str, Any]:
    """The manifest, when the files are those it describes."""
    path = data / "manifest.json"
    if not path.is_file():
        raise UserError(f"{data} is not a data set: it holds no manifest.json")
    try:
        manifest = json.loads(path.read_text())
        for key in ("file", "kind", "vocab_size", "eod_id", "sha256"):
            manifest["tokenizer"][key]
        manifest["created_by"], manifest["sources"], manifest["dtype"]
        for name, split in manifest["splits"].items():
            for ending in ("bin", "idx"):
                file = data / f"{name}.{ending}"
                size = file.stat().st_size if file.is_file() else 0
                if size != split[f"{ending}_bytes"]:
                    raise UserError(
                        f"{file} has {size:,} bytes, the manifest says "
                        f"{split[f'{ending}_bytes']:,}: the data set is damaged, tokenize again"
                    )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a data set's manifest: {error!r}") from error
    return manifest
