"""Text to a data set: the input is cut into parts, processes tokenize them, and the parts are joined."""

import dataclasses
import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import tyro

from data_prep.dataset.merge import join
from data_prep.dataset.output import check_space, is_done
from data_prep.dataset.shards import token_dtype
from data_prep.encode.beginning import find_bos
from data_prep.encode.encoders import Encoder, open_encoder, sha256
from data_prep.encode.guard import Verdict, judge
from data_prep.encode.split import DEFAULT_VALIDATION, Fractions
from data_prep.encode.tokenize_part import BadFiles, Job, start
from data_prep.errors import UserError
from data_prep.left_out import LeftOut
from data_prep.parts.plan import Part, plan_parts, to_json
from data_prep.parts.pool import about, usable_cores, work_through
from data_prep.parts.workplace import Workplace, check_outside
from data_prep.progress import Progress
from data_prep.read.chat import Chat, prompt_fields
from data_prep.read.reading import BadLines, InvalidUtf8, Reading, TextDocuments
from data_prep.read.sources import find_sources
from data_prep.version import VERSION

# To be raised by a change after which the same input and options give other bytes.
OUTPUT_VERSION = 2


@dataclass(frozen=True)
class Tokenize:
    """Turn text into a data set: Megatron .bin/.idx files with a manifest."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Files (.jsonl, .json, .txt, .text, with .zst, .gz, .bz2 or .xz; .parquet; .arrow), folders of
    them, patterns, folders that `datasets` saved; or URLs of such (s3://, gs://, https://)."""
    output_dir: Path
    """The data set's folder, made whole or not at all."""
    tokenizer: Path
    """A SentencePiece .model, or a Hugging Face tokenizer.json."""
    eod_token: str | None = None
    """The token that ends documents, for a tokenizer.json; None: the first usual one it has."""
    add_bos: bool = False
    """Documents also begin with the tokenizer's BOS token, as those of Llama and Gemma do. Prompts of a
    model that is trained on them begin with it too."""
    validation_fraction: float = DEFAULT_VALIDATION
    """The share of documents to hold out, chosen by their content's hash. Of few documents this default
    may hold out none."""
    test_fraction: float = 0.0
    """The same, for a test split."""
    text_field: tuple[str, ...] = ("text",)
    """Of a JSON line or a row, the key of its text, or a path to it (meta.text). Several texts are
    joined by an empty line."""
    text_documents: TextDocuments = "file"
    """What a document is in a plain text file."""
    chat_field: str | None = None
    """Instruction data: the key of a list of messages ({"role": ..., "content": ...}). They are
    rendered by the tokenizer's chat template, and the assistant's turns alone are trained on."""
    chat_template: Path | None = None
    """A file with the template, or a name, where the tokenizer has several; None: the one beside the
    tokenizer, of several the one named default."""
    answer_field: str | None = None
    """Instruction data without messages: the answer, which alone is trained on; --text-field names
    the prompt before it."""
    prompt_template: Path | None = None
    """With --answer-field, in place of --text-field: a file with the prompt, in which {source} stands for
    the field source, and so on."""
    include: tuple[str, ...] = ()
    """File name patterns to take from folders and patterns, such as "*.py"; read as plain text unless their
    ending says otherwise."""
    exclude: tuple[str, ...] = ()
    """Patterns of paths to leave out of folders and patterns."""
    min_tokens: int | None = None
    """Documents of fewer tokens, the one that ends them included, are left out; None: none is. For
    training on long sequences."""
    max_bad_lines: int = 100
    """More lines that cannot be used than this stop the work."""
    max_document_bytes: int = 16 << 20
    """A longer line, or text file, cannot be used. Memory grows with it."""
    invalid_utf8: InvalidUtf8 = "skip"
    """What is not UTF-8 is skipped as a bad line, replaced by U+FFFD, or stops the work."""
    bad_files: BadFiles = "stop"
    """A damaged file stops the work, when all else is done; or what can be read of it is taken."""
    engine: Literal["fast", "reference"] = "fast"
    """fast is used when it gives the reference tokenizer's ids, which is checked first."""
    workers: int | None = None
    """Processes; None: one for each core. The output does not depend on it."""
    rank: int | None = None
    """Of a job array's task, from 0: do its share of the parts, and leave joining them to
    `data merge`."""
    world_size: int = 1
    """Tasks of the job array."""


def tokenize(options: Tokenize) -> str:
    """Makes the data set, or a rank's parts of it, and returns a summary.

    Raises:
        UserError: bad input, an output folder in use, or too little space.
    """
    _check_numbers(options)
    encoder = open_encoder(options.tokenizer, options.eod_token)
    check_outside(options.output_dir, options.inputs)
    left_out = LeftOut()
    sources = find_sources(options.inputs, options.include, options.exclude, left_out)
    place = Workplace(options.output_dir)
    reading = _reading(options, encoder, place)
    if reading.chat and (plain := next((s for s in sources if s.kind == "text"), None)):
        raise UserError(
            f"{plain.path} is plain text: instruction data are JSON lines or rows of a table"
        )
    manifest = _manifest(options, encoder, reading)
    if is_done(options.output_dir, manifest, sources):
        place.remove_what_is_left()
        return f"{options.output_dir}: already done from the same text, nothing to do"
    check_space(options.output_dir, sources, manifest["dtype"], place.bytes())
    parts = plan_parts(sources, options.text_documents)
    fingerprint = _fingerprint(manifest)
    plan = {
        "fingerprint": fingerprint,
        "max_bad_lines": options.max_bad_lines,
        "manifest": manifest,
        "sources": [asdict(source) for source in sources],
        "parts": to_json(parts, sources),
        "left_out": left_out.facts(),
    }
    mine = [p for p in parts if p.number % options.world_size == (options.rank or 0)]
    if options.rank is not None:
        with place.held(alone=False):
            place.agree_on(plan, options.tokenizer)
            summary = _work(options, place, encoder, reading, fingerprint, mine)
        return f"{summary}\nAll ranks done? megatron-ladder data merge {options.output_dir}"
    with place.held(alone=True):
        place.write_plan(plan, options.tokenizer)
        place.remove_parts_except({part.key(fingerprint) for part in parts})
        try:
            summary = _work(options, place, encoder, reading, fingerprint, mine)
            return f"{summary}\n{join(place, plan)}\nData set: {options.output_dir}"
        except BaseException:
            if not any(place.parts.glob("*.json")):  # no part is done, so there is nothing to keep
                place.remove()
            raise


def _work(
    options: Tokenize,
    place: Workplace,
    encoder: Encoder,
    reading: Reading,
    fingerprint: str,
    mine: list[Part],
) -> str:
    """Tokenizes those parts of `mine` that are not done yet; returns a summary."""
    job = Job(
        folder=str(place.parts),
        fingerprint=fingerprint,
        tokenizer=str(options.tokenizer),
        eod_token=options.eod_token,
        eod_id=encoder.eod_id,
        bos_id=find_bos(options.tokenizer, encoder) if options.add_bos else None,
        min_tokens=options.min_tokens or 1,
        dtype=token_dtype(encoder.vocab_size),
        engine=Verdict(False, (), f"engine: {encoder.kind}'s own, as asked"),
        reading=reading,
        fractions=Fractions(options.validation_fraction, options.test_fraction),
        max_bad_lines=options.max_bad_lines,
        bad_files=options.bad_files,
    )
    bad, left = BadLines(options.max_bad_lines), []
    for part in mine:
        if (facts := job.done(part)) is None:
            left.append(part)
        else:
            bad.add_part(facts["bad"])
    if not left:
        return f"all {len(mine)} parts were done before"
    if options.engine == "fast":
        verdict = judge(options.tokenizer, encoder, options.eod_token, left, reading)
        job = dataclasses.replace(job, engine=verdict)
    workers = options.workers or usable_cores()
    progress = Progress(sum(part.bytes for part in left), "tokenizing")
    try:
        results, failed = work_through(functools.partial(start, job), left, workers, bad, progress)
    finally:
        seconds = progress.close()
    if failed:
        raise UserError(
            f"{about(failed, done=len(results))}\nMend or leave out those files and run the same "
            "command again, or give --bad-files skip to take what can be read of them"
        )
    tokens = sum(facts["tokens"] for r in results for facts in r["splits"].values())
    text = sum(facts["text_bytes"] for r in results for facts in r["splits"].values())
    again = f" ({len(mine) - len(left)} of {len(mine)} parts were done before)"
    return (
        f"{job.engine.report}\n{text / 1e6:.1f} MB of text in {seconds:.1f} s: "
        f"{text / 1e6 / seconds:.1f} MB/s, {tokens / 1e6 / seconds:.2f}M tokens/s, at most "
        f"{max(result['peak_memory'] for result in results) / 1e6:.0f} MB of memory a process"
        f"{again if len(left) < len(mine) else ''}{_templates_left(options)}"
    )


def _reading(options: Tokenize, encoder: Encoder, place: Workplace) -> Reading:
    return Reading(
        options.text_field,
        options.text_documents,
        options.invalid_utf8,
        options.max_document_bytes,
        _chat(options, encoder, place),
    )


def _chat(options: Tokenize, encoder: Encoder, place: Workplace) -> Chat | None:
    eod_text = encoder.piece(encoder.eod_id)
    if options.chat_field is None:
        if options.chat_template is not None:
            raise UserError("--chat-template needs --chat-field: the key of the messages")
        if options.prompt_template is not None:
            return _asked(options, options.prompt_template, eod_text)
        if options.answer_field is None:
            return None
        if len(options.text_field) != 1:
            raise UserError(
                "--answer-field takes one --text-field, the prompt; --prompt-template FILE makes a prompt "
                "of several fields"
            )
        return Chat((*options.text_field, options.answer_field), None, eod_text)
    if options.answer_field is not None:
        raise UserError("give --chat-field or --answer-field, not both")
    if options.prompt_template is not None:
        raise UserError(
            "--prompt-template is for --answer-field; messages are rendered by --chat-template"
        )
    if encoder.kind == "sentencepiece":
        raise UserError(
            "--chat-field needs a tokenizer.json: the control tokens of chat templates are ordinary "
            "text to SentencePiece; give --text-field PROMPT --answer-field ANSWER"
        )
    from data_prep.read.templates import load_template

    day = _day_of(place) or date.today().isoformat()
    template = load_template(options.tokenizer, options.chat_template, day)
    return Chat((options.chat_field,), template, eod_text)


def _asked(options: Tokenize, file: Path, eod_text: str) -> Chat:
    """Prompts by a template, and their answers."""
    if options.answer_field is None:
        raise UserError(
            "--prompt-template needs --answer-field: what is trained on after the prompt"
        )
    if options.text_field != ("text",):
        raise UserError("--prompt-template names the prompt's fields: leave out --text-field")
    try:
        prompt = file.read_text(encoding="utf-8")
    except UnicodeError as error:
        raise UserError(f"--prompt-template {file} is no text in UTF-8: {error}") from error
    prompt = prompt.removesuffix("\n")  # an editor's, as in chat templates
    try:
        fields = prompt_fields(prompt)
    except UserError as error:
        raise UserError(f"--prompt-template {file}: {error}") from error
    if options.answer_field in fields:
        raise UserError(
            f"--prompt-template {file}: {{{options.answer_field}}} is the answer, which follows the prompt"
        )
    return Chat((*fields, options.answer_field), None, eod_text, prompt)


def _templates_left(options: Tokenize) -> str:
    if options.chat_field is None:
        return ""
    from data_prep.read.templates import other_templates

    others = other_templates(options.tokenizer, options.chat_template)
    return f"\nThe tokenizer's other chat templates: {', '.join(others)}" if others else ""


def _day_of(place: Workplace) -> str | None:
    """The day that this data set's chat template had when the work began, which may be done on another."""
    for path in (place.output_dir / "manifest.json", place.folder / "plan.json"):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return json.loads(found.get("manifest", found)["options"]["chat"]["template"])[2]
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return None


def _manifest(options: Tokenize, encoder: Encoder, how: Reading) -> dict[str, Any]:
    """What is known of the manifest before the text is read."""
    reading = asdict(how)
    del reading["id_field"]  # `data clean`'s
    if how.chat is not None and how.chat.prompt is None:
        del reading["chat"]["prompt"]  # absent where it is not asked for
    return {
        "format": "megatron-ladder-data",
        "version": 1,
        "created_by": f"megatron-ladder {VERSION}",
        "tokenizer": {
            "kind": encoder.kind,
            "file": "tokenizer.model" if encoder.kind == "sentencepiece" else "tokenizer.json",
            "sha256": sha256(options.tokenizer),
            "vocab_size": encoder.vocab_size,
            "eod_id": encoder.eod_id,
            # Absent where it is not asked for.
            **({"bos_id": find_bos(options.tokenizer, encoder)} if options.add_bos else {}),
        },
        "dtype": token_dtype(encoder.vocab_size),
        # As it is after a way through JSON: lists, no tuples.
        "options": {
            **json.loads(json.dumps(reading)),
            "validation_fraction": options.validation_fraction,
            "test_fraction": options.test_fraction,
            "bad_files": options.bad_files,
            **({} if options.min_tokens is None else {"min_tokens": options.min_tokens}),
        },
    }


def _fingerprint(manifest: dict[str, Any]) -> str:
    """A hash of everything that decides the output, except the input files."""
    facts = {key: manifest[key] for key in ("tokenizer", "dtype", "options")}
    text = json.dumps([OUTPUT_VERSION, facts], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _check_numbers(options: Tokenize) -> None:
    fractions = (options.validation_fraction, options.test_fraction)
    if not (min(fractions) >= 0 and sum(fractions) < 1):  # NaN is neither
        raise UserError(
            f"--validation-fraction {fractions[0]} and --test-fraction {fractions[1]} must be 0 or "
            "more, and leave something to train on"
        )
    if not options.text_field:
        raise UserError("--text-field needs a name")
    if options.max_document_bytes < 1:
        raise UserError(f"--max-document-bytes {options.max_document_bytes} must be 1 or more")
    if options.min_tokens is not None and options.min_tokens < 1:
        raise UserError(f"--min-tokens {options.min_tokens} must be 1 or more")
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers {options.workers} must be 1 or more")
    if options.rank is None and options.world_size != 1:
        raise UserError(
            f"--world-size {options.world_size} needs --rank: a job array's task number, from 0"
        )
    if options.rank is not None and not 0 <= options.rank < options.world_size:
        raise UserError(
            f"--rank {options.rank} is not one of --world-size {options.world_size}: ranks count "
            "from 0"
        )
