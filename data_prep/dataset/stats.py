"""Figures and a picture of a data set: how long its documents are, and which tokens are common."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from data_prep.dataset.folder import DataSet, open_data_set
from data_prep.encode.encoders import Encoder
from data_prep.errors import UserError
from data_prep.files import write_durably
from data_prep.progress import Progress

TOKENS_AT_ONCE = 16 << 20
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
TOP = 30
BINS_PER_DOUBLING = 2


@dataclass(frozen=True)
class Stats:
    """Show document lengths, bytes a token and the commonest tokens, as text and as a picture."""

    data: tyro.conf.Positional[Path]
    """The data set's folder."""
    split: Literal["train", "validation", "test"] = "train"
    output: Path | None = None
    """The picture (.png); None: stats-SPLIT.png in the folder where you are."""
    json: Path | None = None
    """Also write the figures to this file."""


@dataclass(frozen=True)
class Figures:
    """Figures of one split."""

    documents: int
    tokens: int
    text_bytes: int
    longest: int
    percentiles: dict[int, int]
    """Tokens of a document, by percentile of the documents."""
    edges: list[int]
    """Borders of the histogram of lengths, in tokens; a length equal to a border is in the bin above it."""
    documents_by_length: list[int]
    tokens_by_length: list[int]
    entropy: float
    """In nats a token: no model that ignores context has a lower loss."""
    used: int
    """Token ids that occur."""
    vocab_size: int
    counts: np.ndarray
    """How often each token id occurs, int64 [vocab_size]."""


def stats(options: Stats) -> str:
    """Draws the picture and returns what to print.

    Raises:
        UserError: not a data set, no such split, or it is damaged.
    """
    data = open_data_set(options.data)
    if problems := data.wrong_sizes():
        raise UserError(f"{problems[0]}: the data set is damaged, tokenize again")
    if options.split not in data.manifest["splits"]:
        raise UserError(f"{options.data} has no {options.split} split")
    picture = options.output or Path(f"stats-{options.split}.png")
    if picture.suffix != ".png":
        raise UserError(f"--output {picture}: the picture is a .png")
    for file in filter(None, (picture, options.json)):
        if not file.absolute().parent.is_dir():
            raise UserError(f"{file}: its folder does not exist")
    encoder = data.open_encoder()
    figures = measure(data, options.split)
    draw(figures, encoder, f"{options.data.name}, {options.split}", picture)
    if options.json is not None:
        write_durably(options.json, json.dumps(as_json(figures, encoder), indent=1) + "\n")
    return f"{describe(figures, encoder)}\nPicture: {picture}"


def measure(data: DataSet, split: str) -> Figures:
    """Reads all of the split, a little at a time."""
    facts = data.manifest["splits"][split]
    lengths = np.asarray(data.lengths(split))  # four bytes a document
    if lengths.min() < 1 or lengths.sum(dtype=np.int64) != facts["tokens"]:
        raise UserError(
            f"{data.file(split, 'idx')} does not describe {facts['tokens']:,} tokens: see `data verify`"
        )
    order = np.sort(lengths)
    edges = length_edges(int(order[-1]))
    cuts = np.searchsorted(order, edges)
    total = np.concatenate([[0], order.cumsum(dtype=np.int64)])
    counts = np.zeros(data.manifest["tokenizer"]["vocab_size"], np.int64)
    progress = Progress(facts["bin_bytes"], "counting")
    with data.file(split, "bin").open("rb") as file:
        while len(ids := np.fromfile(file, data.dtype, TOKENS_AT_ONCE)):
            for wrong in (int(ids.min()), int(ids.max())):  # before a table of that size is made
                if not 0 <= wrong < len(counts):
                    raise UserError(
                        f"{data.file(split, 'bin')} holds token id {wrong}, not one of the vocabulary's "
                        f"{len(counts):,}: see `data verify`"
                    )
            counts += np.bincount(ids, minlength=len(counts))
            progress.add(ids.nbytes)
    progress.close()
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return Figures(
        documents=len(lengths),
        tokens=int(total[-1]),
        text_bytes=facts["text_bytes"],
        longest=int(order[-1]),
        percentiles={p: int(order[(len(order) - 1) * p // 100]) for p in PERCENTILES},
        edges=edges.tolist(),
        documents_by_length=np.diff(cuts).tolist(),
        tokens_by_length=np.diff(total[cuts]).tolist(),
        entropy=float(-(shares * np.log(shares)).sum()),
        used=int((counts > 0).sum()),
        vocab_size=len(counts),
        counts=counts,
    )


def length_edges(longest: int) -> np.ndarray:
    """1, 2, 3, 4, 6, 8, 11, ...: two bins for each doubling, up to one above the longest."""
    exponents = np.arange(0, BINS_PER_DOUBLING * (np.log2(longest) + 1) + 1) / BINS_PER_DOUBLING
    edges = np.unique(np.round(2**exponents).astype(np.int64))
    return edges[: int(np.searchsorted(edges, longest, side="right")) + 1]


def top_tokens(figures: Figures, encoder: Encoder) -> list[tuple[int, str, float]]:
    """The commonest: id, piece, share of all tokens."""
    order = np.argsort(-figures.counts, kind="stable")[:TOP]
    return [
        (int(i), encoder.piece(int(i)), float(figures.counts[i] / figures.tokens))
        for i in order
        if figures.counts[i]
    ]


def describe(figures: Figures, encoder: Encoder) -> str:
    lines = [
        f"{figures.documents:,} documents, {figures.tokens:,} tokens, "
        f"{figures.text_bytes / figures.tokens:.2f} bytes a token",
        f"entropy of single tokens {figures.entropy:.3f} nats; {figures.used:,} of "
        f"{figures.vocab_size:,} ids used ({100 * figures.used / figures.vocab_size:.0f} %)",
        "tokens in a document: "
        + ", ".join(f"{p} %: {length:,}" for p, length in figures.percentiles.items())
        + f", longest: {figures.longest:,}",
        "",
        f"{'tokens in a document':>24} {'documents':>12} {'of tokens':>10}",
    ]
    first = next(e for e, n in zip(figures.edges, figures.documents_by_length, strict=False) if n)
    for low, high, documents, tokens in zip(
        figures.edges,
        figures.edges[1:],
        figures.documents_by_length,
        figures.tokens_by_length,
        strict=False,
    ):
        if low < first or low > figures.longest:
            continue
        share = tokens / figures.tokens
        bar = "#" * round(40 * share)
        lines.append(f"{f'{low:,} to {high - 1:,}':>24} {documents:>12,} {share:>9.1%} {bar}")
    lines += ["", "commonest tokens:"]
    for token_id, piece, share in top_tokens(figures, encoder):
        lines.append(f"{token_id:>9} {share:>6.2%}  {piece!r}")
    return "\n".join(lines)


def as_json(figures: Figures, encoder: Encoder) -> dict[str, Any]:
    plain = {key: value for key, value in vars(figures).items() if key != "counts"}
    return {
        **plain,
        "bytes_per_token": figures.text_bytes / figures.tokens,
        "top_tokens": [
            {"id": i, "piece": piece, "share": share}
            for i, piece, share in top_tokens(figures, encoder)
        ],
    }


def draw(figures: Figures, encoder: Encoder, title: str, path: Path) -> None:
    """Documents and tokens by document length, the commonest tokens, and all of them by rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    figure.suptitle(
        f"{title}: {figures.documents:,} documents, {figures.tokens:,} tokens, "
        f"{figures.text_bytes / figures.tokens:.2f} bytes a token"
    )
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
    for row, (values, what) in enumerate(
        ((figures.documents_by_length, "documents"), (figures.tokens_by_length, "tokens"))
    ):
        axes = figure.add_subplot(grid[row, 0])
        axes.stairs(values, figures.edges, fill=True, color=("#0072b2", "#009e73")[row])
        axes.set_xscale("log")
        axes.set_xlabel("tokens in a document")
        axes.set_ylabel(what)
        for percentile in (5, 50, 95):
            at = figures.percentiles[percentile]
            axes.axvline(at, color="0.3", linewidth=0.8, linestyle=":")
            if row == 0:
                axes.annotate(f" {percentile} %", (at, axes.get_ylim()[1]), va="top", fontsize=8)
    common = top_tokens(figures, encoder)[:20][::-1]
    axes = figure.add_subplot(grid[0, 1])
    axes.barh(range(len(common)), [100 * share for *_, share in common], color="#e69f00")
    axes.set_yticks(range(len(common)), [_drawn(piece) for _, piece, _ in common], fontsize=7)
    axes.set_xlabel("% of tokens")
    axes.set_title("commonest tokens", fontsize=10)
    axes = figure.add_subplot(grid[1, 1])
    ranked = np.sort(figures.counts[figures.counts > 0])[::-1]
    axes.plot(np.arange(1, len(ranked) + 1), ranked, color="#cc79a7")
    axes.set(xscale="log", yscale="log", xlabel="rank of the token", ylabel="times")
    axes.set_title(
        f"{figures.used:,} of {figures.vocab_size:,} ids used, {figures.entropy:.2f} nats",
        fontsize=10,
    )
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=130, format="png")
    temporary.replace(path)


def _drawn(piece: str) -> str:
    """The piece in characters that the picture's font has, and not read as a formula. SentencePiece's mark
    for a space is a dot in the middle."""
    shown = repr(piece.replace("\u2581", "\u00b7"))[1:-1].replace("$", r"\$")
    shown = ascii(shown)[1:-1] if any(ord(c) > 0x24F for c in shown) else shown
    return shown if len(shown) <= 14 else f"{shown[:12]}... ({len(piece)})"
