"""The two passes over the text: judge each document by itself, then write those that repeat no other."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from data_prep.clean import duplicates
from data_prep.clean.frames import Frames, read_frames
from data_prep.clean.quality import Quality, make_judge
from data_prep.files import sync_file, write_durably
from data_prep.parts.plan import Part
from data_prep.parts.pool import Tally, Work
from data_prep.read.documents import read_segment
from data_prep.read.reading import BadLines, Reading, printable
from data_prep.read.records import Named
from data_prep.read.sources import Segment

SAMPLES = 20
SAMPLE_CHARACTERS = 500
REASONS = ("", "repeated id", "exact duplicate", "near duplicate")
DECISION = np.dtype([("reason", "u1"), ("of", "<i8")])
"""About a document: an index in REASONS (0: it stays), and the index of the document that it repeats."""


@dataclass(frozen=True)
class Rules:
    """What decides whether a document stays."""

    quality: tuple[Quality, ...]
    min_characters: int | None
    max_characters: int | None
    exact: bool
    near: float | None
    """The threshold for near duplicates; None: they stay."""


@dataclass(frozen=True)
class Job:
    """What a process needs to know.

    Files in `folder` of a part with the key K:

    K.jsonl.zst         the documents that the first pass kept
    K.ordinals, K.ids, K.exact, K.signatures, K.bands
                        of each of them: its number in the file, its id's and its text's digest, MinHash
    K.json              the facts of the part, and samples of dropped documents; written last
    K.decisions.npy     which of the kept documents the second pass drops, and why
    """

    folder: str
    fingerprint: str
    reading: Reading
    rules: Rules
    max_bad_lines: int

    def file(self, part: Part, name: str) -> Path:
        return Path(self.folder) / f"{part.key(self.fingerprint)}.{name}"


def start_judging(job: Job, tally: Tally) -> Work:
    judge = make_judge(job.rules.quality, job.rules.min_characters, job.rules.max_characters)

    def work(part: Part) -> dict[str, Any]:
        return _judge_part(job, judge, part, tally)

    return work


def _judge_part(job: Job, judge: Any, part: Part, tally: Tally) -> dict[str, Any]:
    bad = BadLines(job.max_bad_lines)
    dropped, dropped_bytes = Counter[str](), Counter[str]()
    samples: list[dict[str, Any]] = []
    sources: list[dict[str, Any]] = []
    kept = text_bytes = 0
    names = ["ordinals"]
    names += ["ids"] * bool(job.reading.id_field) + ["exact"] * job.rules.exact
    names += ["signatures"] * (job.rules.near is not None)
    files: dict[str, BinaryIO] = {name: job.file(part, name).open("wb") for name in names}
    try:
        with Frames(job.file(part, "jsonl.zst")) as out:
            for segment in part.segments:
                ordinal = 0
                batches = read_segment(segment, job.reading, bad, lambda n: tally.add(n, 0))
                for text in (text for texts in batches for text in texts):
                    ordinal += 1
                    raw = text.encode()
                    text_bytes += len(raw)
                    if (why := judge(text)) is not None:
                        dropped[why] += 1
                        dropped_bytes[why] += len(raw)
                        if dropped[why] <= SAMPLES:
                            samples.append(sample(why, text, where(segment, ordinal)))
                        continue
                    record = {"text": text[:], "source": where(segment, ordinal)}
                    if isinstance(text, Named):
                        record["id"] = text.name
                        files["ids"].write(duplicates.digest(text.name))
                    files["ordinals"].write(ordinal.to_bytes(4, "little"))
                    if job.rules.exact:
                        files["exact"].write(duplicates.digest(text))
                    if job.rules.near is not None:
                        row = np.array(duplicates.signature(text), "<u4")
                        files["signatures"].write(row.tobytes())
                    out.write(record)
                    kept += 1
                sources.append(
                    {
                        "path": printable(segment.source.path),
                        "begin": segment.begin,
                        "kept_up_to": kept,
                    }
                )
    finally:
        for file in files.values():
            file.close()
    if job.rules.near is not None and kept:
        _write_bands(job, part, kept)
        names.append("bands")
    for name in names:
        if job.file(part, name).is_file():
            sync_file(job.file(part, name))
    result = {
        "kept": kept,
        "text_bytes": text_bytes,
        "dropped": dict(dropped),
        "dropped_bytes": dict(dropped_bytes),
        "samples": samples,
        "sources": sources,
        "bad": {"count": bad.count, "examples": bad.examples},
    }
    write_durably(job.file(part, "json"), orjson.dumps(result).decode())
    return result


def where(segment: Segment, ordinal: int) -> str:
    """Names a document by its number in the file, or in the range of the file that a part holds."""
    return place_name(segment.source.path, segment.begin, ordinal)


def place_name(path: str, begin: int, ordinal: int) -> str:
    return f"{printable(path)}#{ordinal}" + (f" from {begin:,}" if begin else "")


def sample(why: str, text: str, source: str) -> dict[str, Any]:
    """The entry of a dropped document in the file of samples."""
    return {"reason": why, "source": source, "text": text[:SAMPLE_CHARACTERS]}


def _write_bands(job: Job, part: Part, kept: int) -> None:
    assert job.rules.near is not None
    rows = duplicates.rows_per_band(job.rules.near)
    signatures = open_signatures(job, part, kept)
    shape = (duplicates.PERMUTATIONS // rows, kept)
    bands = np.memmap(job.file(part, "bands"), "<u8", "w+", shape=shape)
    for begin in range(0, kept, 1 << 16):
        end = begin + (1 << 16)
        bands[:, begin:end] = duplicates.band_keys(signatures[begin:end], rows)
    bands.flush()


def open_signatures(job: Job, part: Part, kept: int) -> np.ndarray:
    shape = (kept, duplicates.PERMUTATIONS)
    return np.memmap(job.file(part, "signatures"), "<u4", "r", shape=shape)


def start_writing(job: Job, output: str, tally: Tally) -> Work:
    """The second pass: writes output/NUMBER.jsonl.zst, without the documents that are dropped."""

    def work(part: Part) -> dict[str, Any]:
        decisions = np.load(job.file(part, "decisions.npy"))
        source, target = job.file(part, "jsonl.zst"), Path(output) / f"{part.number:05d}.jsonl.zst"
        samples: list[dict[str, Any]] = []
        seen, dropped_bytes = Counter[str](), Counter[str]()
        with Frames(target) as out:
            for record, (reason, of) in zip(read_frames(source), decisions.tolist(), strict=True):
                if not reason:
                    out.write(record)
                    continue
                why = REASONS[reason]
                seen[why] += 1
                dropped_bytes[why] += len(record["text"].encode())
                if seen[why] <= SAMPLES:
                    samples.append({**sample(why, record["text"], record["source"]), "of": of})
        tally.add(part.bytes, 0)
        return {
            "samples": samples,
            "dropped": dict(seen),
            "dropped_bytes": dict(dropped_bytes),
            "bad": {"count": 0, "examples": []},
        }

    return work
