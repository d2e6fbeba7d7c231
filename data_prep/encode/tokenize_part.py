"""Tokenizes parts, each into files of its own: tokens never travel between processes.

A part is done when its marker, KEY.json, is there: it is written last. So a run that is killed at any
instant loses only the parts that it was working on.
"""

import functools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.encode.conversations import encode_conversations
from data_prep.encode.engines import Engine, FastEngine, LazyReference
from data_prep.encode.guard import Verdict
from data_prep.encode.part_files import PartFiles
from data_prep.encode.split import Fractions
from data_prep.errors import UserError
from data_prep.files import write_durably
from data_prep.parts.plan import Part
from data_prep.parts.pool import Tally, Work, peak_memory
from data_prep.read.documents import read_segment
from data_prep.read.reading import BadLines, NoTextField, Reading, TooManyBadLines

BadFiles = Literal["stop", "skip"]
LONG_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Job:
    """What a process needs to know to tokenize any part of the input."""

    folder: str
    """Where parts go."""
    fingerprint: str
    """A hash of everything that decides the output, except the input files."""
    tokenizer: str
    eod_token: str | None
    eod_id: int
    bos_id: int | None
    min_tokens: int
    dtype: str
    engine: Verdict
    reading: Reading
    fractions: Fractions
    max_bad_lines: int
    bad_files: BadFiles

    def marker(self, part: Part) -> Path:
        return Path(self.folder) / f"{part.key(self.fingerprint)}.json"

    def done(self, part: Part) -> dict[str, Any] | None:
        """What the part's marker says; None: the part is to be done."""
        try:
            return json.loads(self.marker(part).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


def tokenize_part(job: Job, engine: Engine, part: Part, tally: Tally) -> dict[str, Any]:
    """Writes the part's files and its marker; returns what the marker says.

    Raises:
        UserError, OSError: the input cannot be used or read, or there is no space.
    """
    started = time.monotonic()
    bad = BadLines(job.max_bad_lines)
    sources: list[dict[str, Any]] = []
    stem = f"{job.marker(part).with_suffix('')}"
    with PartFiles(stem, job.dtype, job.eod_id, job.fractions, job.bos_id, job.min_tokens) as files:
        for segment in part.segments:
            facts: dict[str, Any] = {
                "path": segment.source.path,
                "documents": 0,
                "skipped_lines": 0,
            }
            before = bad.count
            batches = read_segment(segment, job.reading, bad, lambda n: tally.add(n, 0))
            try:
                for texts in long_ones_alone(batches):
                    if job.reading.chat:
                        documents, tokens = files.add_conversations(
                            texts, *encode_conversations(engine, texts)
                        )
                    else:
                        documents, tokens = files.add(texts, *engine.encode(texts))
                    facts["documents"] += documents
                    tally.add(0, tokens)
            except (TooManyBadLines, NoTextField):
                raise
            except UserError as error:
                if job.bad_files == "stop":
                    raise
                facts["error"] = str(error)
            facts["skipped_lines"] = bad.count - before
            sources.append(facts)
        splits = files.close()
    result = {
        "splits": splits,
        "sources": sources,
        "empty": files.empty,
        "too_short": files.too_short,
        "bad": {"count": bad.count, "examples": bad.examples, "replaced": bad.replaced},
        "seconds": time.monotonic() - started,
        "peak_memory": peak_memory(),
    }
    write_durably(job.marker(part), json.dumps(result) + "\n")
    return result


def long_ones_alone(batches: Iterator[list[str]]) -> Iterator[list[str]]:
    """Batches in which a long document is alone, so that its ids are not copied to join those of others."""
    for texts in batches:
        some: list[str] = []
        for text in texts:
            if len(text) > LONG_CHARACTERS:
                if some:
                    yield some
                some = []
                yield [text]
            else:
                some.append(text)
        if some:
            yield some


def make_engine(job: Job) -> Engine:
    reference = LazyReference(Path(job.tokenizer), job.eod_token)
    if not job.engine.fast:
        return reference.engine()
    assert job.engine.source is not None
    return FastEngine(job.engine.source, job.engine.routed, reference, job.engine.characters)


def start(job: Job, tally: Tally) -> Work:
    """Called once in each process of the pool; returns what it does with each part."""
    return functools.partial(tokenize_part, job, make_engine(job), tally=tally)
