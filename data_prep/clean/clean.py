"""`data clean`: leaves out duplicates and documents that quality rules refuse, and reports what it did."""

import contextlib
import functools
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import tyro

from data_prep.clean import duplicates
from data_prep.clean.passes import (
    DECISION,
    REASONS,
    Job,
    Rules,
    start_judging,
    start_writing,
)
from data_prep.clean.quality import Quality, make_judge
from data_prep.clean.report import choose_samples, make_report, summarize
from data_prep.errors import UserError
from data_prep.files import sync_folder, write_durably
from data_prep.left_out import LeftOut
from data_prep.parts.plan import Part, plan_parts
from data_prep.parts.pool import Start, about, usable_cores, work_through
from data_prep.parts.workplace import Workplace, check_outside
from data_prep.progress import Progress
from data_prep.read.reading import BadLines, InvalidUtf8, Reading, TextDocuments
from data_prep.read.sources import DROPPED, REPORT, Source, find_sources
from data_prep.version import VERSION

# To be raised by a change after which the same input and options give other documents.
OUTPUT_VERSION = 2


@dataclass(frozen=True)
class Clean:
    """Leave out duplicates and text that quality rules refuse; report what was dropped and why."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders, patterns or URLs, as `data tokenize` takes them."""
    output_dir: Path
    """A folder for what is left (.jsonl.zst) and the report, made whole or not at all."""
    exact_dedup: bool = False
    """Keep the first of documents with the same text."""
    near_dedup: bool = False
    """Keep the first of documents that have nearly all runs of five words in common (MinHash)."""
    near_threshold: float = 0.8
    """The share of them that makes two documents near duplicates."""
    quality: tuple[Quality, ...] = ()
    """Rules of Gopher's and FineWeb's papers, for text in languages with spaces between words."""
    min_characters: int | None = None
    max_characters: int | None = None
    id_field: str | None = None
    """Keep the first of documents with the same id, which this key holds."""
    text_field: tuple[str, ...] = ("text",)
    """Of a JSON line or a row, the key of its text, or a path to it (meta.text)."""
    text_documents: TextDocuments = "file"
    """What a document is in a plain text file."""
    include: tuple[str, ...] = ()
    """File name patterns to take from folders and patterns, such as "*.py"; read as plain text unless their
    ending says otherwise."""
    exclude: tuple[str, ...] = ()
    """Patterns of paths to leave out of folders and patterns."""
    max_bad_lines: int = 100
    """More lines that cannot be used than this stop the work."""
    max_document_bytes: int = 16 << 20
    """A longer line, or text file, cannot be used. Memory grows with it."""
    invalid_utf8: InvalidUtf8 = "skip"
    """What is not UTF-8 is skipped as a bad line, replaced by U+FFFD, or stops the work."""
    workers: int | None = None
    """Processes; None: one for each core. The output does not depend on it."""


def clean(options: Clean) -> str:
    """Writes OUTPUT_DIR and returns a summary. Killed, it goes on from the parts that were done.

    Raises:
        UserError: bad input, no rule to apply, or an output folder in use.
    """
    _check(options)
    left_out = LeftOut()
    sources = find_sources(options.inputs, options.include, options.exclude, left_out)
    facts = _facts(options)
    made_of = [[s.path, s.bytes, s.version] for s in sources]
    place = Workplace(options.output_dir)
    if _is_done(options.output_dir, facts, made_of):
        place.remove_what_is_left()
        return f"{options.output_dir}: already done from the same text, nothing to do"
    job = Job(
        str(place.parts),
        hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest(),
        Reading(
            options.text_field,
            options.text_documents,
            options.invalid_utf8,
            options.max_document_bytes,
            id_field=options.id_field,
        ),
        _rules(options),
        options.max_bad_lines,
    )
    parts = plan_parts(sources, options.text_documents)
    with place.held(alone=True):
        place.remove_parts_except({part.key(job.fingerprint) for part in parts})
        try:
            judged = _judge(options, job, parts)
        except BaseException:
            if not any(place.parts.glob("*.json")):  # no part is done, so there is nothing to keep
                place.remove()
            raise
        dropped = _find_duplicates(job, parts, [p["kept"] for p in judged])
        return _write(options, place, job, parts, judged, dropped, facts, sources, left_out)


def _judge(options: Clean, job: Job, parts: list[Part]) -> list[dict[str, Any]]:
    """The first pass, for the parts that are not done yet. Returns the facts of all parts."""
    bad, left = BadLines(options.max_bad_lines), []
    for part in parts:
        if job.file(part, "json").is_file():
            bad.add_part(orjson.loads(job.file(part, "json").read_bytes())["bad"])
        else:
            left.append(part)
    if left:
        _work(options, functools.partial(start_judging, job), left, "judging", bad)
    return [orjson.loads(job.file(part, "json").read_bytes()) for part in parts]


def _work(
    options: Clean, start: Start, parts: list[Part], what: str, bad: BadLines
) -> list[dict[str, Any]]:
    progress = Progress(sum(part.bytes for part in parts), what)
    workers = options.workers or usable_cores()
    try:
        done, failed = work_through(start, parts, workers, bad, progress)
    finally:
        progress.close()
    if failed:
        raise UserError(
            f"{about(failed, len(done))}\nMend or leave out those files and run the same command again"
        )
    return done


def _find_duplicates(job: Job, parts: list[Part], counts: list[int]) -> np.ndarray:
    """Decides about every document that the first pass kept: DECISION [documents]. Each rule looks only
    at documents that the rules before it kept."""
    decisions = np.zeros(sum(counts), DECISION)

    def drop(reason: str, places: np.ndarray, first: np.ndarray) -> None:
        goes = first != np.arange(len(first))
        decisions["reason"][places[goes]] = REASONS.index(reason)
        decisions["of"][places[goes]] = places[first[goes]]

    for name, reason in (("ids", "repeated id"), ("exact", "exact duplicate")):
        if (name == "ids" and job.reading.id_field) or (name == "exact" and job.rules.exact):
            places = np.flatnonzero(decisions["reason"] == 0)
            digests = np.concatenate(
                [np.fromfile(job.file(part, name), "<u8").reshape(-1, 2) for part in parts]
            )
            drop(reason, places, duplicates.first_of_same(digests[places]))
    if job.rules.near is not None and len(decisions):
        places = np.flatnonzero(decisions["reason"] == 0)
        held = [(part, count) for part, count in zip(parts, counts, strict=True) if count]
        bands = duplicates.PERMUTATIONS // duplicates.rows_per_band(job.rules.near)
        files = [np.memmap(job.file(p, "bands"), "<u8", "r", shape=(bands, n)) for p, n in held]
        keys = (np.concatenate([file[band] for file in files])[places] for band in range(bands))
        with _signatures(job, held) as signatures:
            first = duplicates.near_duplicates(keys, signatures, places, job.rules.near)
        drop("near duplicate", places, first)
    return decisions


@contextlib.contextmanager
def _signatures(job: Job, held: list[tuple[Part, int]]) -> Iterator[np.ndarray]:
    """The signatures of all parts, in one file that is mapped: memory may be too small for them."""
    path = Path(job.folder) / "signatures.tmp-all"
    with path.open("wb") as out:
        for part, _ in held:
            with job.file(part, "signatures").open("rb") as file:
                shutil.copyfileobj(file, out, 16 << 20)
    shape = (sum(n for _, n in held), duplicates.PERMUTATIONS)
    try:
        yield np.memmap(path, "<u4", "r", shape=shape)
    finally:
        path.unlink()


def _write(
    options: Clean,
    place: Workplace,
    job: Job,
    parts: list[Part],
    judged: list[dict[str, Any]],
    decisions: np.ndarray,
    facts: dict[str, Any],
    sources: list[Source],
    left_out: LeftOut,
) -> str:
    """The second pass, the report, and the rename."""
    data = place.folder / "data"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    begin = 0
    for part, facts_of_part in zip(parts, judged, strict=True):
        end = begin + facts_of_part["kept"]
        with job.file(part, "decisions.npy").open("wb") as file:
            np.save(file, decisions[begin:end])
        begin = end
    start = functools.partial(start_writing, job, str(data))
    written = _work(options, start, parts, "writing", BadLines(options.max_bad_lines))
    for path in data.iterdir():
        if not path.stat().st_size:
            path.unlink()  # nothing of the part is left
    report = make_report(judged, written)
    report |= {"made_by": f"megatron-ladder {VERSION}", "options": facts}
    report["sources"] = [[s.path, s.bytes, s.version] for s in sources]
    if left_out:
        report["left_out"] = left_out.facts()
    samples = choose_samples(job, parts, judged, written)
    summary = summarize(report, [e for part in judged for e in part["bad"]["examples"]])
    if not report["kept"]["documents"]:
        place.remove()
        raise UserError(f"nothing is left, so nothing was written\n{summary}")
    lines = "".join(orjson.dumps(one).decode() + "\n" for one in samples)
    write_durably(data / DROPPED, lines)
    write_durably(data / REPORT, json.dumps(report, indent=1) + "\n")
    sync_folder(data)
    if place.target.is_dir():
        place.target.rmdir()  # it is empty
    data.replace(place.target)
    sync_folder(place.target.parent)
    place.remove()
    return (
        f"{summary}\nReport: {options.output_dir / REPORT}, samples of what was dropped: "
        f"{options.output_dir / DROPPED}\n"
        f"Go on: megatron-ladder data tokenize {options.output_dir} ..."
    )


def _rules(options: Clean) -> Rules:
    return Rules(
        options.quality,
        options.min_characters,
        options.max_characters,
        options.exact_dedup,
        options.near_threshold if options.near_dedup else None,
    )


def _facts(options: Clean) -> dict[str, Any]:
    """The options that decide the output, as JSON gives them back."""
    facts = {key: v for key, v in asdict(options).items() if key not in ("inputs", "workers")}
    return json.loads(json.dumps({**facts, "output_dir": "", "version": OUTPUT_VERSION}))


def _is_done(output_dir: Path, facts: dict[str, Any], made_of: list[Any]) -> bool:
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output-dir {output_dir} is a file: give a folder")
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        return False
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        report = json.loads((output_dir / REPORT).read_text(encoding="utf-8"))
        options = report["options"] | {"version": OUTPUT_VERSION}  # an older one is done too
        if options == facts and report["sources"] == made_of:
            return True
    raise UserError(
        f"--output-dir {output_dir} is not empty and holds something else: choose another folder, or "
        "remove it"
    )


def _check(options: Clean) -> None:
    """Refuses what cannot work before anything is read."""
    limits = (options.min_characters, options.max_characters)
    if not (
        options.exact_dedup
        or options.near_dedup
        or options.quality
        or options.id_field
        or any(limit is not None for limit in limits)
    ):
        raise UserError(
            "nothing to do: give --exact-dedup, --near-dedup, --quality RULES, --min-characters, "
            "--max-characters or --id-field"
        )
    if not 0 < options.near_threshold <= 1:  # NaN is neither
        raise UserError(f"--near-threshold {options.near_threshold} must be above 0, at most 1")
    if limits[0] is not None and limits[1] is not None and limits[0] > limits[1]:
        raise UserError(f"--min-characters {limits[0]} is above --max-characters {limits[1]}")
    if not options.text_field:
        raise UserError("--text-field needs a name")
    for name in ("max_document_bytes", "workers", "min_characters", "max_characters"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be 1 or more")
    check_outside(options.output_dir, options.inputs)
    make_judge(options.quality, None, None)  # refuses when its library is missing
    if options.near_dedup:
        duplicates.check_rensa()
