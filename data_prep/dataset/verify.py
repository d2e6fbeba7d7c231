"""Checks every byte of a data set by the manifest's checksums, and its contents by the format's rules."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from data_prep.dataset.folder import DataSet, open_data_set
from data_prep.dataset.shards import DTYPE_CODES, HEADER_BYTES
from data_prep.encode.encoders import sha256
from data_prep.errors import UserError
from data_prep.parts.pool import usable_cores
from data_prep.progress import Progress

TOKENS_AT_ONCE = 4 << 20
DOCUMENTS_AT_ONCE = 1 << 20
SHOWN = 20


@dataclass(frozen=True)
class Verify:
    """Check a data set: checksums, index, token ids, the end of every document."""

    data: tyro.conf.Positional[Path]
    """The data set's folder."""
    workers: int | None = None
    """Threads; None: one for each core."""


@dataclass
class Found:
    """What is wrong, and what is only unusual."""

    problems: list[str] = field(default_factory=list)
    eod_inside: int = 0
    """EOD ids inside documents: a tokenizer.json turns text that spells the token into its id."""


@dataclass(frozen=True)
class Range:
    """Documents that follow one another in .bin: those of a part in the manifest, or all of a split."""

    split: str
    first_document: int
    documents: int
    first_token: int
    tokens: int
    sha256: str | None


def verify(options: Verify) -> str:
    """Reads everything; returns a summary.

    Raises:
        UserError: something is wrong; up to 20 problems are named, by file, document and byte.
    """
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers {options.workers} must be 1 or more")
    data = open_data_set(options.data)
    found = Found(data.wrong_sizes())
    facts = data.manifest["tokenizer"]
    if not data.tokenizer.is_file():
        found.problems.append(f"{data.tokenizer} is missing")
    elif sha256(data.tokenizer) != facts["sha256"]:
        found.problems.append(f"{data.tokenizer} is not the one in the manifest (sha256 differs)")
    if not 0 <= facts["eod_id"] < facts["vocab_size"]:
        found.problems.append(f"{data.path}/manifest.json: EOD {facts['eod_id']} is no token id")
    seconds = 0.0
    splits = data.manifest["splits"]
    if not found.problems:  # little more can be said of files that are missing or cut short
        progress = Progress(sum(split["bin_bytes"] for split in splits.values()), "verifying")
        for split in splits:
            _check_index(data, split, found)
        if not found.problems:
            _check_tokens(data, options.workers or usable_cores(), found, progress)
        for split in splits:
            _check_mask(data, split, found)
        seconds = progress.close()
    if found.problems:
        shown = "\n".join(f"  {problem}" for problem in found.problems[:SHOWN])
        more = len(found.problems) - SHOWN
        raise UserError(
            f"{data.path} is damaged:\n{shown}" + (f"\n  and {more:,} more" if more > 0 else "")
        )
    return _summary(data, found, seconds)


def _summary(data: DataSet, found: Found, seconds: float) -> str:
    splits = data.manifest["splits"].values()
    size = sum(split["bin_bytes"] for split in splits)
    lines = [
        f"OK: {sum(s['documents'] for s in splits):,} documents, {sum(s['tokens'] for s in splits):,} "
        f"tokens, {size / 1e6:.1f} MB in {seconds:.1f} s ({size / 1e6 / max(seconds, 1e-9):.0f} MB/s)"
    ]
    if not all(_has_checksums(split) for split in splits):
        lines.append(
            "The manifest has no checksums: the contents fit the format, a changed token may go unnoticed"
        )
    if found.eod_inside:
        lines.append(
            f"{found.eod_inside:,} EOD ids are inside documents: their text spells the token, and a "
            "tokenizer.json turns that into its id"
        )
    return "\n".join(lines)


def _has_checksums(split: dict[str, Any]) -> bool:
    masked = "mask_bytes" in split
    parts = split.get("parts", [{}])
    return "idx_sha256" in split and all(
        ("mask_sha256" if masked else "sha256") in p for p in parts
    )


def _check_index(data: DataSet, split: str, found: Found) -> None:
    """Header, lengths, offsets, documents, counts, checksum."""
    path, facts = data.file(split, "idx"), data.manifest["splits"][split]
    count, width = facts["documents"], data.dtype.itemsize
    if "idx_sha256" in facts:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["idx_sha256"]:
                found.problems.append(f"{path}: its sha256 is not the manifest's")
    raw = np.memmap(path, np.uint8, "r")
    header = raw[:HEADER_BYTES].tobytes()
    sizes = np.frombuffer(header[18:], "<u8").tolist()
    if header[:17] != b"MMIDIDX\x00\x00\x01" + bytes(7) or sizes != [count, count + 1]:
        found.problems.append(f"{path}: not the header of an index of {count:,} documents")
        return
    if header[17] != DTYPE_CODES[data.manifest["dtype"]]:
        found.problems.append(f"{path}: not the index of {data.manifest['dtype']} tokens")
    lengths = data.lengths(split)
    offsets = raw[HEADER_BYTES + 4 * count : HEADER_BYTES + 12 * count].view("<i8")
    firsts = raw[HEADER_BYTES + 12 * count :].view("<i8")
    end = 0
    for start in range(0, count, DOCUMENTS_AT_ONCE):
        some = lengths[start : start + DOCUMENTS_AT_ONCE].astype(np.int64)
        ends = end + np.cumsum(some)
        _first_wrong(found, path, "length", some < 1, start, HEADER_BYTES, 4)
        wrong = offsets[start : start + len(some)] != (ends - some) * width
        _first_wrong(found, path, "offset", wrong, start, HEADER_BYTES + 4 * count, 8)
        wrong = firsts[start : start + len(some)] != np.arange(start, start + len(some))
        _first_wrong(found, path, "place", wrong, start, HEADER_BYTES + 12 * count, 8)
        end = int(ends[-1])
    if firsts[count] != count:
        found.problems.append(f"{path}: its last entry is {firsts[count]}, not {count}")
    if end != facts["tokens"] or end * width != facts["bin_bytes"]:
        found.problems.append(
            f"{path}: its documents have {end:,} tokens; the manifest says {facts['tokens']:,}, "
            f"{facts['bin_bytes']:,} bytes"
        )
    for key, what in (("documents", count), ("tokens", end)):
        if "parts" in facts and sum(part[key] for part in facts["parts"]) != what:
            found.problems.append(
                f"{data.path}/manifest.json: the {split} parts' {key} do not add up"
            )


def _first_wrong(
    found: Found, path: Path, what: str, wrong: np.ndarray, start: int, table: int, width: int
) -> None:
    if wrong.any():
        number = start + int(wrong.argmax())
        found.problems.append(
            f"{path}: the {what} of document {number:,} is wrong (byte {table + width * number:,})"
        )


def _ranges(data: DataSet) -> Iterator[Range]:
    for split, facts in data.manifest["splits"].items():
        document = token = 0
        whole = {"documents": facts["documents"], "tokens": facts["tokens"], "sha256": None}
        for part in facts.get("parts", [whole]):
            yield Range(split, document, part["documents"], token, part["tokens"], part["sha256"])
            document, token = document + part["documents"], token + part["tokens"]


def _check_tokens(data: DataSet, workers: int, found: Found, progress: Progress) -> None:
    """Checks each range of .bin. Threads are enough: hashing and numpy release the interpreter's lock."""
    with ThreadPoolExecutor(workers) as pool:
        for one in pool.map(lambda part: _check_range(data, part, progress), _ranges(data)):
            found.problems += one.problems
            found.eod_inside += one.eod_inside


def _check_range(data: DataSet, part: Range, progress: Progress) -> Found:
    """Checksum, ids below the vocabulary's size, and an EOD at the end of each document."""
    found = Found()
    path, facts = data.file(part.split, "bin"), data.manifest["tokenizer"]
    vocab_size, eod = facts["vocab_size"], facts["eod_id"]
    lengths = data.lengths(part.split)
    digest = hashlib.sha256()
    width = data.dtype.itemsize
    # The first document that is not checked yet, and where the one before it ends.
    document, document_end = part.first_document, part.first_token
    with path.open("rb") as file:
        file.seek(part.first_token * width)
        token, last = part.first_token, part.first_token + part.tokens
        while token < last:
            raw = file.read(min(TOKENS_AT_ONCE, last - token) * width)
            digest.update(raw)
            ids = np.frombuffer(raw, data.dtype)
            wrong = (ids < 0) | (ids >= vocab_size)
            if wrong.any():
                at = int(wrong.argmax())
                found.problems.append(
                    f"{path}: token id {ids[at]} at byte {(token + at) * width:,} is not below the "
                    f"vocabulary's {vocab_size:,} ({int(wrong.sum()):,} such ids near it)"
                )
            ends = _ends(lengths, document, part, document_end, token + len(ids))
            if "bos_id" in facts:
                starts = np.concatenate([[document_end], ends]) - token
                firsts = ids[starts[(starts >= 0) & (starts < len(ids))]]
                if without := int((firsts != facts["bos_id"]).sum()):
                    found.problems.append(
                        f"{path}: {without:,} documents of bytes {token * width:,} to "
                        f"{(token + len(ids)) * width:,} do not begin with BOS {facts['bos_id']}"
                    )
            document_end = int(ends[-1]) if len(ends) else document_end
            missing = ids[ends - 1 - token] != eod
            if missing.any():
                at = int(missing.argmax())
                found.problems.append(
                    f"{path}: document {document + at:,} does not end with EOD {eod} (byte "
                    f"{(int(ends[at]) - 1) * width:,}; {int(missing.sum()):,} such documents near it)"
                )
            found.eod_inside += int((ids == eod).sum()) - len(ends) + int(missing.sum())
            document += len(ends)
            token += len(ids)
            progress.add(len(raw))
    if part.sha256 is not None and digest.hexdigest() != part.sha256:
        found.problems.append(
            f"{path}: bytes {part.first_token * width:,} to {last * width:,} have another sha256 than "
            f"the manifest's (documents {part.first_document:,} to "
            f"{part.first_document + part.documents:,})"
        )
    return found


def _ends(
    lengths: np.ndarray, document: int, part: Range, document_end: int, limit: int
) -> np.ndarray:
    """The ends of the documents from `document` on, as far as they are not above token `limit`."""
    last = part.first_document + part.documents
    found = []
    while document < last:
        some = lengths[document : min(document + DOCUMENTS_AT_ONCE, last)].astype(np.int64)
        ends = document_end + np.cumsum(some)
        within = int(np.searchsorted(ends, limit, side="right"))
        found.append(ends[:within])
        if within < len(ends):
            break
        document, document_end = document + len(ends), int(ends[-1])
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _check_mask(data: DataSet, split: str, found: Found) -> None:
    facts = data.manifest["splits"][split]
    if "mask_bytes" not in facts:
        return
    path = data.file(split, "mask")
    if facts["mask_bytes"] != facts["tokens"]:
        found.problems.append(f"{path}: a byte for each of {facts['tokens']:,} tokens is needed")
        return
    trained = 0
    with path.open("rb") as file:
        for part in facts.get("parts", [facts]):
            digest = hashlib.sha256()
            begin = file.tell()
            end = begin + part["tokens"]
            while raw := file.read(min(TOKENS_AT_ONCE, end - file.tell())):
                digest.update(raw)
                mask = np.frombuffer(raw, np.uint8)
                if (mask > 1).any():
                    at = file.tell() - len(raw) + int((mask > 1).argmax())
                    found.problems.append(f"{path}: byte {at:,} is neither 0 nor 1")
                trained += int(mask.astype(bool).sum())
            if digest.hexdigest() != part.get("mask_sha256", digest.hexdigest()):
                found.problems.append(
                    f"{path}: bytes {begin:,} to {end:,} have another sha256 than the manifest's"
                )
    if trained != facts.get("trained_tokens"):
        said = "nothing" if (n := facts.get("trained_tokens")) is None else f"{n:,}"
        found.problems.append(
            f"{path} has {trained:,} tokens to train on, the manifest says {said}"
        )
