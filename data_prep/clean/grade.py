"""`data grade`: triplets of source, draft and reference in three files, by how far off their drafts are.

They are for training in stages, easy drafts first (arXiv 2406.15741, which grades by COMET). The score is
sacrebleu's chrF of a draft against its reference: it needs no model, and holds for one sentence.
"""

import shutil
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import tyro

from data_prep.errors import UserError
from data_prep.files import sync_file, sync_folder
from data_prep.left_out import LeftOut
from data_prep.left_out import summary as left_out_summary
from data_prep.parts.workplace import Workplace, check_outside
from data_prep.progress import Progress
from data_prep.read.chat import Chat, Conversation
from data_prep.read.documents import read_documents
from data_prep.read.reading import BadLines, Reading
from data_prep.read.sources import Source, find_sources

GRADES = ("easy", "medium", "hard")
SCORE = "chrf"
"""The field with the score, in the files that are written."""


@dataclass(frozen=True)
class Grade:
    """Divide triplets of source, draft and reference into three files, for training in stages: easy (drafts
    far from their references, with much to mend), medium, hard (nearly right drafts)."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Files of JSON lines or rows, folders, patterns or URLs, as `data tokenize` takes them."""
    output_dir: Path
    """A folder for easy.jsonl, medium.jsonl and hard.jsonl, made whole or not at all."""
    text_field: tuple[str, ...] = ("source", "draft", "reference")
    """Of a JSON line or a row, the keys of a triplet, or paths to them (meta.text). The last two are the
    draft and the reference; all are kept, and no others."""
    max_bad_lines: int = 100
    """More lines that cannot be used than this stop the work."""


def grade(options: Grade) -> str:
    """Writes OUTPUT_DIR and returns a summary.

    Raises:
        UserError: bad input, an output folder in use, scores that make no three grades, or no sacrebleu.
    """
    score = _scorer()
    if len(options.text_field) < 2 or len(set(options.text_field)) < len(options.text_field):
        raise UserError("--text-field: give two names or more, the draft and the reference last")
    if SCORE in options.text_field:
        raise UserError(f"--text-field {SCORE}: that is the name of the score in what is written")
    check_outside(options.output_dir, options.inputs)
    left_out = LeftOut()
    sources = find_sources(options.inputs, left_out=left_out)
    for source in sources:
        if source.kind == "text":
            raise UserError(f"{source.path} is plain text: give JSON lines or rows of a table")
    place = Workplace(options.output_dir)
    if place.target.exists() and not (place.target.is_dir() and not any(place.target.iterdir())):
        raise UserError(f"--output-dir {options.output_dir} exists: choose another, or remove it")
    bad = BadLines(options.max_bad_lines)
    with place.held(alone=True):
        try:
            data = place.folder / "data"
            shutil.rmtree(data, ignore_errors=True)
            data.mkdir()
            lines = _read(sources, options.text_field, bad)
            scores = _write_scored(place.folder / "scored", lines, options.text_field, score)
            bounds = _bounds(scores)
            numbers = np.digitize(scores, bounds)
            _divide(place.folder / "scored", numbers, data)
            if place.target.is_dir():
                place.target.rmdir()  # it is empty
            data.replace(place.target)
            sync_folder(place.target.parent)
        finally:
            place.remove()
    return _summary(options, scores, numbers, bad, left_out)


def _scorer() -> Callable[[str, str], float]:
    """chrF of a text against its reference, 0 to 100.

    Raises:
        UserError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise UserError(
            f"`data grade` scores with sacrebleu: pip install 'megatron-ladder[refine]' ({error})"
        ) from error
    chrf = CHRF()
    return lambda draft, reference: chrf.sentence_score(draft, [reference]).score


def _read(sources: list[Source], fields: tuple[str, ...], bad: BadLines) -> Iterator[list[str]]:
    """The fields of each triplet."""
    reading = Reading(chat=Chat(fields, None, ""))  # a piece for each field
    progress = Progress(sum(source.bytes for source in sources), "grading")
    try:
        for source in sources:
            for text in read_documents(source, reading, bad, progress.add):
                assert isinstance(text, Conversation)
                yield [piece for piece, _ in text.pieces]
    finally:
        progress.close()


def _write_scored(
    path: Path,
    triplets: Iterator[list[str]],
    fields: tuple[str, ...],
    score: Callable[[str, str], float],
) -> np.ndarray:
    """Writes a JSON line for each triplet, with its score; returns the scores, fp64 [triplets]."""
    scores = array("d")
    with path.open("wb") as out:
        for values in triplets:
            found = score(*values[-2:])
            scores.append(found)
            line = dict(zip(fields, values, strict=True)) | {SCORE: round(found, 2)}
            out.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
    return np.frombuffer(scores)


def _bounds(scores: np.ndarray) -> np.ndarray:
    """Where medium and hard begin: fp64 [2], ascending.

    Raises:
        UserError: a grade would be empty.
    """
    if len(scores) < len(GRADES):
        raise UserError(f"{len(scores)} triplets: three grades need three at least")
    bounds = np.quantile(scores, [1 / 3, 2 / 3])
    if len(np.unique(np.digitize(scores, bounds))) < len(GRADES):
        raise UserError(
            f"a third of the drafts or more have the same chrF, {bounds[0]:.1f}, so that a grade would be "
            "empty: leave out drafts that are like their references, or like each other"
        )
    return bounds


def _divide(scored: Path, numbers: np.ndarray, folder: Path) -> None:
    """Writes a file for each grade, in the order of the input."""
    with ExitStack() as stack:
        files = [stack.enter_context((folder / f"{g}.jsonl").open("wb")) for g in GRADES]
        with scored.open("rb") as lines:
            for line, number in zip(lines, numbers.tolist(), strict=True):
                files[number].write(line)
    for name in GRADES:
        sync_file(folder / f"{name}.jsonl")
    sync_folder(folder)


def _summary(
    options: Grade, scores: np.ndarray, numbers: np.ndarray, bad: BadLines, left_out: LeftOut
) -> str:
    lines = [f"{'grade':<8}{'triplets':>10}   chrF of its drafts"]
    for number, name in enumerate(GRADES):
        some = scores[numbers == number]
        lines.append(
            f"{name:<8}{len(some):>10,}   {some.min():.1f} to {some.max():.1f}, mean {some.mean():.1f}"
        )
    if bad.count:
        lines.append(f"{bad.count:,} lines skipped; the first ones:")
        lines += [f"  {example}" for example in bad.examples]
    if left_out:
        lines.append(left_out_summary(left_out.facts()))
    names = ", ".join(f"{name}.jsonl" for name in GRADES)
    return "\n".join([*lines, f"{options.output_dir}: {names}"])
