"""Trains a SentencePiece tokenizer that keeps every byte of the text, also white space of source code."""

import contextlib
import heapq
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece
import tyro

from data_prep.encode.split import hash_fraction
from data_prep.errors import UserError
from data_prep.left_out import LeftOut, summary
from data_prep.progress import Progress
from data_prep.read.documents import read_documents
from data_prep.read.reading import BadLines, Reading, TextDocuments
from data_prep.read.sources import Source, find_sources

# SentencePiece takes "sentences" of at most this many bytes; longer lines are cut.
SENTENCE_BYTES = 4096
MOST_PIECES = 1 << 24
RESERVED = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class TrainTokenizer:
    """Train a SentencePiece tokenizer (byte fallback, no normalisation)."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """What `data tokenize` reads."""
    output_dir: Path
    """Where tokenizer.model goes."""
    vocab_size: int
    """Pieces, special ones and 256 bytes included."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    special_tokens: tuple[str, ...] = ()
    """Tokens that no text becomes, such as <fim_prefix> <fim_middle> <fim_suffix>; ids from 3."""
    max_training_bytes: int = 100_000_000
    """Of more text than this, documents are sampled evenly. So much is held in memory."""
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


def train_tokenizer(options: TrainTokenizer) -> Path:
    """Trains and writes OUTPUT_DIR/tokenizer.model, whole or not at all.

    The same input gives the same file. Ids: 0 unknown, 1 begin, 2 end of document.

    Raises:
        UserError: bad input, or a vocabulary that the text cannot fill.
    """
    if options.vocab_size > MOST_PIECES:
        raise UserError(f"--vocab-size {options.vocab_size:,}: give at most {MOST_PIECES:,}")
    if options.vocab_size < 300:
        raise UserError(
            f"--vocab-size {options.vocab_size}: 256 bytes and the special pieces take some 260; "
            "give 300 or more"
        )
    tokens = options.special_tokens
    if len(set(tokens)) < len(tokens) or any(
        not t or t in RESERVED or t.split() != [t] for t in tokens
    ):
        raise UserError(
            f"--special-tokens {' '.join(tokens)}: give each once, without white space, and none of "
            f"{' '.join(RESERVED)}"
        )
    target = options.output_dir / "tokenizer.model"
    if target.exists():
        raise UserError(f"{target} exists: remove it or choose another --output-dir")
    left_out = LeftOut()
    sources = find_sources(options.inputs, options.include, options.exclude, left_out)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    bad = BadLines(options.max_bad_lines)
    model = io.BytesIO()
    problems: list[UserError] = []
    try:
        with _ended_by_ctrl_c():
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=_sentences(sources, options, bad, problems),
                model_writer=model,
                vocab_size=options.vocab_size,
                model_type=options.model_type,
                byte_fallback=True,
                character_coverage=0.9995,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                # SentencePiece reads line by line and never sees a line's end: it gets a piece here.
                user_defined_symbols=["\n", "\t"],
                control_symbols=list(options.special_tokens),
                max_sentence_length=SENTENCE_BYTES + 64,
                num_threads=8,  # fixed: the model records it
                minloglevel=2,
            )
    except RuntimeError as error:
        if problems:
            raise problems[0] from error
        _report(bad, left_out)
        raise UserError(f"SentencePiece: {_reason(str(error))}") from error
    if problems:
        raise problems[0]
    temporary = target.with_suffix(".model.tmp")
    with temporary.open("wb") as file:
        file.write(model.getvalue())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)
    _report(bad, left_out)
    return target


def _report(bad: BadLines, left_out: LeftOut) -> None:
    """Says what of the input was not used."""
    if bad.count:
        shown = "\n".join(f"  {example}" for example in bad.examples)
        print(f"{bad.count:,} lines or files skipped; the first ones:\n{shown}", file=sys.stderr)
    if left_out:
        print(summary(left_out.facts()), file=sys.stderr)


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """While C++ trains, Python does not see Ctrl-C, so the system ends the process. Nothing has been
    written then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Sample:
    """Documents of at most `limit` bytes in all, in the order of the input: the smallest by their hashes.

    Each has the same chance, except those larger than the limit.

    Args:
        share: about which share of the documents the limit has room for, if that is known.
    """

    def __init__(self, limit: int, share: float = 1.0) -> None:
        self._limit, self._bytes, self._count = limit, 0, 0
        self._share = share  # documents with this hash, or a larger one, are left out
        self._held: list[tuple[float, int, bytes]] = []
        """A heap of -hash, number in the input, text."""

    def add(self, text: str) -> None:
        self._count += 1
        if not text or (fraction := hash_fraction(text)) >= self._share:
            return
        raw = text.encode()
        if len(raw) > self._limit:
            return
        heapq.heappush(self._held, (-fraction, self._count, raw))
        self._bytes += len(raw)
        # Copies of a document have the same hash: when one goes, all go.
        while self._bytes > self._limit or (self._held and -self._held[0][0] >= self._share):
            largest, _, gone = heapq.heappop(self._held)
            self._share, self._bytes = -largest, self._bytes - len(gone)

    def texts(self) -> Iterator[str]:
        """Gives the documents, and gives up their memory."""
        self._held.sort(key=lambda held: -held[1])
        while self._held:
            yield self._held.pop()[2].decode()


def _known_share(sources: list[Source], limit: int) -> float:
    """Of the documents. Files that are not packed have as many bytes as their text, or some more."""
    packed = any(source.compression or source.kind in ("parquet", "arrow") for source in sources)
    total = sum(source.bytes for source in sources)
    return 1.0 if packed or total <= limit else limit / total


def _sentences(
    sources: list[Source], options: TrainTokenizer, bad: BadLines, problems: list[UserError]
) -> Iterator[str]:
    """Lines of the sampled documents. A UserError goes to `problems`, as C++ would lose it."""
    sample = Sample(options.max_training_bytes, _known_share(sources, options.max_training_bytes))
    progress = Progress(sum(source.bytes for source in sources), "reading")
    reading = Reading(options.text_field, options.text_documents)
    try:
        for source in sources:
            for text in read_documents(source, reading, bad, progress.add):
                sample.add(text)
        for text in sample.texts():
            for line in text.split("\n"):
                yield from _pieces(line)
    except UserError as error:
        problems.append(error)
    finally:
        progress.close()


def _pieces(line: str) -> Iterator[str]:
    """A line in parts of at most SENTENCE_BYTES."""
    step = SENTENCE_BYTES // 4  # a character has at most four bytes
    for start in range(0, len(line), step):
        yield line[start : start + step]


def _reason(message: str) -> str:
    """SentencePiece's message, with what the user can do."""
    if "sentences_.empty()" in message:
        return (
            "no document was sampled: raise --max-training-bytes, or make more documents of plain "
            "text with --text-documents paragraph"
        )
    if "required_chars" in message:
        return "the text has more characters than this --vocab-size: raise it"
    if "Vocabulary size too high" in message or "vocab_size" in message:
        return (
            f"the text is too small for this --vocab-size: {message.rsplit(']')[-1].strip()} "
            "Lower it or give more text."
        )
    return message.rsplit("]", 1)[-1].strip() or message
