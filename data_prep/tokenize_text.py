"""Text to a data set: documents are encoded, split by their hash, and written as Megatron shards."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro

from data_prep.documents import BadLines, TextDocuments, read_documents
from data_prep.encoders import Encoder, open_encoder, sha256
from data_prep.errors import UserError
from data_prep.progress import Progress
from data_prep.shards import ShardWriter, token_dtype
from data_prep.sources import Source, find_sources
from data_prep.train_tokenizer import hash_fraction

BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Tokenize:
    """Turn text into a data set: Megatron .bin/.idx files with a manifest."""

    inputs: tyro.conf.Positional[tuple[Path, ...]]
    """Files (.jsonl, .json, .txt, .text; with .gz or .zst), or folders of them."""
    output_dir: Path
    """The data set's folder, made whole or not at all."""
    tokenizer: Path
    """A SentencePiece .model, or a Hugging Face tokenizer.json."""
    eod_token: str | None = None
    """The token that ends documents, for a tokenizer.json; None: the first usual one it has."""
    validation_fraction: float = 0.01
    """The share of documents to hold out, chosen by their content's hash."""
    test_fraction: float = 0.0
    """The same, for a test split."""
    text_field: str = "text"
    """Of a JSON line, the key of its text."""
    text_documents: TextDocuments = "file"
    """What a document is in a plain text file."""
    include: tuple[str, ...] = ()
    """File name patterns to take from folders, such as "*.py"; read as plain text."""
    exclude: tuple[str, ...] = ()
    """Patterns of paths to leave out of folders."""
    max_bad_lines: int = 100
    """More lines that cannot be used than this stop the work."""


def tokenize(options: Tokenize) -> str:
    """Makes the data set, and returns a summary.

    Raises:
        UserError: bad input, an output folder in use, or too little space.
    """
    _check_fractions(options)
    encoder = open_encoder(options.tokenizer, options.eod_token)
    sources = find_sources(options.inputs, options.include, options.exclude)
    dtype = token_dtype(encoder.vocab_size)
    plan = _plan(options, encoder, dtype, sources)
    if _is_done(options.output_dir, plan):
        return f"{options.output_dir}: already done from the same text, nothing to do"
    _check_space(options.output_dir, sources, dtype)

    target = options.output_dir.resolve()  # a link's own target is what is replaced
    if target.is_mount():
        raise UserError(
            f"--output-dir {options.output_dir} is a mount point: give a folder below it"
        )
    temporary = target.parent / f".{target.name}.tmp"
    held = _fresh_folder(temporary)
    try:
        summary, manifest = _write(temporary, options, encoder, sources, plan)
        _write_durably(temporary / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        if target.is_dir():
            target.rmdir()  # empty, as checked
        temporary.rename(target)
        _sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(held)
    return f"{summary}\nData set: {options.output_dir}"


def _write(
    folder: Path, options: Tokenize, encoder: Encoder, sources: list[Source], plan: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Writes everything but the manifest, which it returns."""
    bad = BadLines(options.max_bad_lines)
    progress = Progress(sum(source.bytes for source in sources), "tokenizing")
    writers: dict[str, ShardWriter] = {}
    empty = 0
    for source, entry in zip(sources, plan["sources"], strict=True):
        bad_before = bad.count
        entry["documents"] = 0
        documents = read_documents(
            source,
            text_field=options.text_field,
            text_documents=options.text_documents,
            bad=bad,
            progress=progress.add,
        )
        for texts in _batches(documents):
            for text, ids in zip(texts, encoder.encode(texts), strict=True):
                if not ids:
                    empty += 1
                    continue
                split = _split(text, options)
                if split not in writers:
                    writers[split] = ShardWriter(folder / split, plan["dtype"])
                writers[split].add([*ids, encoder.eod_id], len(text.encode()))
                entry["documents"] += 1
        entry["skipped_lines"] = bad.count - bad_before
    seconds = progress.close()
    splits = {name: writers[name].close() for name in sorted(writers)}
    _check_splits(splits, options)
    tokenizer_name = plan["tokenizer"]["file"]
    shutil.copyfile(options.tokenizer, folder / tokenizer_name)
    _sync_file(folder / tokenizer_name)
    lines = [
        f"{name}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, "
        f"{facts['text_bytes'] / max(facts['tokens'], 1):.2f} bytes a token"
        for name, facts in splits.items()
    ]
    total = sum(facts["text_bytes"] for facts in splits.values())
    lines.append(f"{total / 1e6:.1f} MB of text in {seconds:.1f} s")
    if empty:
        lines.append(f"{empty:,} empty documents left out")
    if bad.count:
        shown = "\n".join(f"  {example}" for example in bad.examples)
        lines.append(f"{bad.count:,} lines or files skipped; the first ones:\n{shown}")
    return "\n".join(lines), {**plan, "splits": splits}


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Lists of documents of some BATCH_CHARACTERS together."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _split(text: str, options: Tokenize) -> str:
    """By content: a document stays in its split when others come or go."""
    fraction = hash_fraction(text)
    if fraction < options.validation_fraction:
        return "validation"
    return "test" if fraction < options.validation_fraction + options.test_fraction else "train"


def _plan(options: Tokenize, encoder: Encoder, dtype: str, sources: list[Source]) -> dict[str, Any]:
    """The manifest as far as it is known before reading: what the data set is made of."""
    return {
        "format": "megatron-ladder-data",
        "version": 1,
        "created_by": f"megatron-ladder {version('megatron-ladder')}",
        "tokenizer": {
            "kind": encoder.kind,
            "file": "tokenizer.model" if encoder.kind == "sentencepiece" else "tokenizer.json",
            "sha256": sha256(options.tokenizer),
            "vocab_size": encoder.vocab_size,
            "eod_id": encoder.eod_id,
        },
        "dtype": dtype,
        "sources": [{"path": str(s.path), "bytes": s.bytes} for s in sources],
        "options": {
            "text_field": options.text_field,
            "text_documents": options.text_documents,
            "validation_fraction": options.validation_fraction,
            "test_fraction": options.test_fraction,
        },
    }


def _is_done(output_dir: Path, plan: dict[str, Any]) -> bool:
    """Whether the folder holds this very data set. Raises UserError when it holds another thing."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output-dir {output_dir} is a file: give a folder")
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        return False
    try:
        manifest = json.loads((output_dir / "manifest.json").read_text())
        same = all(manifest[key] == plan[key] for key in ("tokenizer", "dtype", "options"))
        whole = all(
            (output_dir / f"{name}.{ending}").stat().st_size == split[f"{ending}_bytes"]
            for name, split in manifest["splits"].items()
            for ending in ("bin", "idx")
        )
        same = same and whole
        made_of = [{"path": s["path"], "bytes": s["bytes"]} for s in manifest["sources"]]
    except (OSError, ValueError, KeyError, TypeError):
        same, made_of = False, []
    if same and made_of == plan["sources"]:
        return True
    raise UserError(
        f"--output-dir {output_dir} is not empty and holds something else: choose another folder, "
        "or remove it"
    )


def _fresh_folder(temporary: Path) -> int:
    """Makes the folder anew, locked while the returned descriptor is open.

    Raises:
        UserError: another process is writing it. The system drops the lock of one that was killed.
    """
    try:
        old = os.open(temporary, os.O_RDONLY)
    except FileNotFoundError:
        pass
    else:
        try:
            fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(temporary)  # of a run that was killed
        except BlockingIOError:
            raise UserError(f"{temporary}: another process is making this data set") from None
        finally:
            os.close(old)
    temporary.mkdir(parents=True)
    descriptor = os.open(temporary, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _check_fractions(options: Tokenize) -> None:
    fractions = (options.validation_fraction, options.test_fraction)
    if not (min(fractions) >= 0 and sum(fractions) < 1):  # NaN is neither
        raise UserError(
            f"--validation-fraction {fractions[0]} and --test-fraction {fractions[1]} must be 0 or "
            "more, and leave something to train on"
        )


def _check_splits(splits: dict[str, dict[str, int]], options: Tokenize) -> None:
    if not splits:
        raise UserError(f"no document with text in {', '.join(map(str, options.inputs))}")
    documents = sum(facts["documents"] for facts in splits.values())
    wanted = {
        "train": 1.0,
        "validation": options.validation_fraction,
        "test": options.test_fraction,
    }
    for name, fraction in wanted.items():
        if fraction and name not in splits:
            raise UserError(
                f"the {name} split got none of the {documents:,} documents: change the fractions, or "
                "give more documents (--text-documents paragraph makes more of plain text)"
            )


def _check_space(output_dir: Path, sources: list[Source], dtype: str) -> None:
    """Refuses a disk that will not hold the tokens: about 3.5 bytes of text make one."""
    text = sum(source.bytes * (4 if source.compression else 1) for source in sources)
    needed = text / 3.5 * (2 if dtype == "uint16" else 4)
    parent = output_dir.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--output-dir {output_dir}: no permission to write in {parent}")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"--output-dir {output_dir}: {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB needed: "
            "free space or choose another disk"
        )


def _write_durably(path: Path, text: str) -> None:
    path.write_text(text)
    _sync_file(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
