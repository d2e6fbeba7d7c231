"""Joins the parts of a data set when all of them are done, and puts the data set in its place."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from data_prep.dataset.shards import append_files, write_index
from data_prep.encode.split import DEFAULT_VALIDATION, SPLITS
from data_prep.errors import UserError
from data_prep.files import sync_file, sync_folder, write_durably
from data_prep.left_out import summary as left_out_summary
from data_prep.parts.plan import Part, check_tiling, from_json
from data_prep.parts.workplace import Workplace
from data_prep.read.reading import BadLines
from data_prep.read.sources import Source


@dataclass(frozen=True)
class Merge:
    """Join the parts that the tasks of a job array have tokenized into the data set."""

    output_dir: tyro.conf.Positional[Path]
    """The --output-dir that the tasks were given."""


def merge(options: Merge) -> str:
    """Makes the data set of parts that are done, and returns a summary.

    Raises:
        UserError: there are no parts, some are missing, left out or there twice, or are being made.
    """
    place = Workplace(options.output_dir)
    if (options.output_dir / "manifest.json").is_file():
        place.remove_what_is_left()
        return f"{options.output_dir}: merged before, nothing to do"
    plan = place.read_plan()
    with place.held(alone=True):
        return join(place, plan)


def join(place: Workplace, plan: dict[str, Any]) -> str:
    """Joins the parts of a plan. The caller has locked the work folder."""
    parts = from_json(plan["parts"], [Source(**facts) for facts in plan["sources"]])
    check_tiling(parts)
    results = _results(place, plan, parts)
    _check_counts(results)
    if "max_bad_lines" in plan:  # an older version's plan has none
        bad = BadLines(plan["max_bad_lines"])
        for _, result in results:
            bad.add_part(result["bad"])  # of all ranks, each of which had fewer
    try:
        chosen = _choose_splits(results, plan)
    except UserError:
        place.remove()  # other options are needed, and these parts are of no use to them
        raise
    target, new = place.target, place.folder / "data"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    splits = {}
    for split, made_of in sorted(chosen.items()):
        stems = [
            (place.parts / key, result["splits"][made_of])
            for key, result in results
            if made_of in result["splits"]
        ]
        splits[split] = _join_split(new / split, plan["manifest"]["dtype"], stems, made_of)
    tokenizer = plan["manifest"]["tokenizer"]["file"]
    shutil.copyfile(place.folder / tokenizer, new / tokenizer)
    sync_file(new / tokenizer)
    manifest = {**plan["manifest"], "sources": _sources(plan, results), "splits": splits}
    if "min_tokens" in manifest["options"]:
        manifest["too_short"] = _too_short(results)
    if left_out := plan.get("left_out"):
        manifest["left_out"] = left_out
    write_durably(new / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    if target.is_dir():
        target.rmdir()  # empty, as checked
    new.rename(target)
    sync_folder(target.parent)
    place.remove()
    return _summary(manifest, results)


def _results(
    place: Workplace, plan: dict[str, Any], parts: list[Part]
) -> list[tuple[str, dict[str, Any]]]:
    """The key and the marker's facts of each part, if all its files are there in their sizes."""
    results: list[tuple[str, dict[str, Any]]] = []
    missing = []
    for part in parts:
        key = part.key(plan["fingerprint"])
        try:
            result = json.loads((place.parts / f"{key}.json").read_text(encoding="utf-8"))
            whole = all(
                (place.parts / f"{key}.{split}.{ending}").stat().st_size == size
                for split, facts in result["splits"].items()
                for ending, size in _sizes(facts)
            )
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if whole:
            results.append((key, result))
        else:
            missing.append(part.number)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(parts)} parts are not done: {_ranges(missing)}; run the tasks "
            "that were not finished again (a task does the parts whose number modulo --world-size is its "
            "--rank), then merge"
        )
    return results


PART_KEYS = ("documents", "tokens", "bin_bytes", "sha256", "mask_sha256")


def _sizes(facts: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """A part's files of one split, by ending, and their bytes."""
    yield "bin", facts["bin_bytes"]
    yield "len", 4 * facts["documents"]
    if "mask_bytes" in facts:
        yield "mask", facts["mask_bytes"]


def _ranges(numbers: list[int]) -> str:
    """3, 7-9, ..."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans[:20])
    return shown + (", ..." if len(spans) > 20 else "")


def _join_split(
    prefix: Path, dtype: str, stems: list[tuple[Path, dict[str, Any]]], split: str
) -> dict[str, Any]:
    def files(ending: str) -> list[Path]:
        return [Path(f"{stem}.{split}.{ending}") for stem, _ in stems]

    append_files(prefix.with_suffix(".bin"), files("bin"))
    digest = write_index(prefix.with_suffix(".idx"), dtype, files("len"))
    keys = ["documents", "tokens", "text_bytes"]
    if any("mask_bytes" in facts for _, facts in stems):
        append_files(prefix.with_suffix(".mask"), files("mask"))
        keys += ["mask_bytes", "trained_tokens"]
    return {
        **{key: sum(facts[key] for _, facts in stems) for key in keys},
        "bin_bytes": prefix.with_suffix(".bin").stat().st_size,
        "idx_bytes": prefix.with_suffix(".idx").stat().st_size,
        "idx_sha256": digest,
        "parts": [{key: facts[key] for key in PART_KEYS if key in facts} for _, facts in stems],
    }


MOST_DOCUMENTS = 2**31 - 1
"""megatron-core numbers the documents of a split in 32 bits. Higher numbers would wrap, in silence."""


def _check_counts(results: list[tuple[str, dict[str, Any]]]) -> None:
    """Refuses a data set whose documents megatron-core could not number. The parts are kept.

    Raises:
        UserError: it says how to cut the data set.
    """
    for split in SPLITS:
        count = sum(r["splits"][split]["documents"] for _, r in results if split in r["splits"])
        if count > MOST_DOCUMENTS:
            raise UserError(
                f"the {split} split would have {count:,} documents, megatron-core numbers at most "
                f"{MOST_DOCUMENTS:,} of a data set. Make {-(-count // MOST_DOCUMENTS)} data sets or more: "
                "run `megatron-ladder data tokenize` once for each, with some of the input files and an "
                "--output-dir of its own, and give all of them to `megatron-ladder train --data.paths`"
            )


def _sources(
    plan: dict[str, Any], results: list[tuple[str, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Every input file, in order, with its documents, its skipped lines and its error."""
    sources = {
        facts["path"]: {
            **{key: facts[key] for key in ("path", "bytes", "version")},
            "documents": 0,
            "skipped_lines": 0,
        }
        for facts in plan["sources"]
    }
    for _, result in results:
        for facts in result["sources"]:
            entry = sources[facts["path"]]
            entry["documents"] += facts["documents"]
            entry["skipped_lines"] += facts["skipped_lines"]
            if "error" in facts:
                entry["error"] = facts["error"]
    return list(sources.values())


def _choose_splits(
    results: list[tuple[str, dict[str, Any]]], plan: dict[str, Any]
) -> dict[str, str]:
    """The splits of the data set that have documents, and the split of the parts that each is made of:
    the same one, unless all of the few documents were held out by default.

    Raises:
        UserError: there is no document, or a split that was asked for got none.
    """
    documents = dict.fromkeys(SPLITS, 0)
    for _, result in results:
        for split, facts in result["splits"].items():
            documents[split] += facts["documents"]
    chosen = {split: split for split, count in documents.items() if count}
    total = sum(documents.values())
    if not total:
        paths = [source["path"] for source in plan["sources"]]
        where = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1:,} other files"
        raise UserError("\n".join([f"no document with text in {where}", *_left_out(results)]))
    options = plan["manifest"]["options"]
    validation = options["validation_fraction"]
    wanted = {
        "train": 1.0,
        # Nobody asked for the default: of few documents it may hold out none, or all.
        "validation": 0.0 if validation == DEFAULT_VALIDATION else validation,
        "test": options["test_fraction"],
    }
    if chosen == {"validation": "validation"} and not wanted["validation"]:
        return {"train": "validation"}
    for split, share in wanted.items():
        if share and split not in chosen:
            text = any(s["kind"] == "text" for s in plan["sources"])
            cut = " (--text-documents paragraph cuts plain text into more)"
            raise UserError(
                f"the {split} split got none of the {total:,} documents: change the fractions, or give "
                f"more documents{cut if text else ''}"
            )
    return chosen


def _summary(manifest: dict[str, Any], results: list[tuple[str, dict[str, Any]]]) -> str:
    def lines() -> Iterator[str]:
        for name, facts in manifest["splits"].items():
            yield (
                f"{name}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, "
                f"{facts['text_bytes'] / max(facts['tokens'], 1):.2f} bytes a token"
                + (f", {facts['trained_tokens']:,} trained on" if "mask_bytes" in facts else "")
            )
        fraction = manifest["options"]["validation_fraction"]
        if fraction and "validation" not in manifest["splits"]:
            yield (
                f"validation: none, as there are few documents: a higher --validation-fraction than "
                f"{fraction} holds out some"
            )
        yield from _left_out(results)
        if errors := [s["error"] for s in manifest["sources"] if "error" in s]:
            shown = "\n".join(f"  {error}" for error in errors[:10])
            yield f"{len(errors):,} files could not be read to their end:\n{shown}"
        if "left_out" in manifest:
            yield left_out_summary(manifest["left_out"])

    return "\n".join(lines())


def _too_short(results: list[tuple[str, dict[str, Any]]]) -> dict[str, int]:
    """The documents left out by --min-tokens, and their tokens."""
    # Parts that an older version made have no such field.
    counts = [result.get("too_short", {}) for _, result in results]
    return {key: sum(one.get(key, 0) for one in counts) for key in ("documents", "tokens")}


def _left_out(results: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    """What was found in the files and is not in the data set as it was."""
    if empty := sum(result["empty"] for _, result in results):
        yield f"{empty:,} empty documents left out"
    if (short := _too_short(results))["documents"]:
        yield (
            f"{short['documents']:,} documents shorter than --min-tokens left out, "
            f"{short['tokens']:,} tokens"
        )
    if replaced := sum(result["bad"]["replaced"] for _, result in results):
        yield f"{replaced:,} documents with invalid UTF-8, replaced by U+FFFD"
    if count := sum(result["bad"]["count"] for _, result in results):
        examples = [e for _, result in results for e in result["bad"]["examples"]][:5]
        shown = "\n".join(f"  {example}" for example in examples)
        yield f"{count:,} lines or files skipped; the first ones:\n{shown}"
