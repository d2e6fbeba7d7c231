"""Does a model refine translations better when it is trained in stages, easy drafts first?

    pip install --editable '.[refine]' polib==1.2.0
    pip install --no-deps django==5.2.19 wagtail==8.0.1
    python benchmarks/refine/stages.py --work-dir DIR --json FILE --picture FILE

`triplets.py` makes triplets of the packages' message catalogues, `data grade` divides them by their drafts'
chrF. A small model begins with the same messages in other languages, whose drafts are spoiled by rule. From
it, models are trained on the same triplets in several orders, with as many tokens and steps each. `eval
--tasks refine` scores what they make of held-out drafts. A seed draws the order of the triplets, in a stage
or in all. All are `megatron-ladder` commands, and the same command goes on where it was stopped.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `measuring` and `refine` are

from measuring import facts, pictures
from measuring.options import parser_of
from pretrain.pictures import COLOURS
from refine import triplets

PROMPT = "English: {source}\nDraft: {draft}\nBrazilian Portuguese: "
GRADES = ("easy", "medium", "hard")
ORDERS = {
    "mixed": "mixed",
    "staged": "staged: easy, medium, hard",
    "reversed": "staged: hard, medium, easy",
    "restarted": "staged, three runs",
}
# Without the source: what is to be learned first is to copy from a draft.
BASE_PROMPT = "Draft: {draft}\n{language}: "
# A prompt is refined with nothing before it, so a triplet sees no other one in training either.
BATCHES = (
    "--preset tiny --parallel.tensor-model-parallel-size 1 --data.no-attend-across-documents "
    "--data.seq-length 512 --micro-batch-size 4 --global-batch-size 4 --log-interval 20"
)
MODEL = (
    "--model.num-layers 3 --model.hidden-size 96 --model.ffn-hidden-size 256 "
    "--model.max-position-embeddings 512 --optimizer.lr 3e-3 --eval-interval 500 "
    "--eval-sequences 16 --save-interval 300"
)
TUNE = "--eval-interval 0 --save-interval 100000"
TOKENS_A_STEP = 2048


def run(*words: object) -> None:
    print("$ megatron-ladder", *words, flush=True)
    command = [sys.executable, "-m", "pretrain.cli", *map(str, words)]
    subprocess.run(command, check=True)  # noqa: S603 (a list)


def make(result: Path, *words: object) -> None:
    """Runs the command that makes a file or a folder, unless a command before has made it."""
    if not result.exists():
        run(*words)


def prepare(work: Path, packages: list[Path], vocab_size: int, base_steps: int) -> None:
    """The texts, the tokenizer, the data sets, and the model to begin with."""
    text, prompt, graded = work / "text", work / "prompt.txt", work / "graded"
    if not text.exists():
        triplets.write(text, packages)
    prompt.write_text(PROMPT)
    make(graded, "data", "grade", text / "train.jsonl", "--output-dir", graded)
    # The references are in it too: a tokenizer without their letters would write them in bytes.
    tokenizer = work / "tokenizer"
    how: tuple[object, ...] = ("--vocab-size", vocab_size, "--output-dir", tokenizer)
    make(tokenizer, "data", "train-tokenizer", text / "tokenizer.jsonl", *how)
    (work / "base-prompt.txt").write_text(BASE_PROMPT)
    sources = {name: graded / f"{name}.jsonl" for name in GRADES}
    sources |= {"held-out": text / "held-out.jsonl", "base": text / "base.jsonl"}
    for name, source in sources.items():
        out, is_base = work / "data" / name, name == "base"
        how = ("--prompt-template", work / "base-prompt.txt" if is_base else prompt)
        how = (*how, "--answer-field", "reference", "--tokenizer", tokenizer / "tokenizer.model")
        how = (*how, "--validation-fraction", 0.02 if is_base else 0, "--output-dir", out)
        make(out, "data", "tokenize", source, *how)
    steps = (
        "--schedule.train-steps",
        base_steps,
        "--schedule.warmup-steps",
        min(base_steps // 4, 40),
    )
    train(work, "base", [work / "data" / "base"], MODEL, *steps)


def train(work: Path, name: str, data: list[Path], options: str, *more: object) -> None:
    """A run, unless it is done: then its scores on the held-out triplets are there."""
    scores = work / "scores" / name
    if scores.exists():
        return
    out = work / "runs" / name
    paths = ("--data.paths", *data) if data else ()
    run("train", *BATCHES.split(), *options.split(), *paths, *more, "--output-dir", out)
    asked = ("--data", work / "data" / "held-out", "--split", "train", "--tasks", "refine")
    part = scores.with_name(f"{name}.part")
    shutil.rmtree(part, ignore_errors=True)
    run("eval", out, *asked, "--batch-size", 32, "--output-dir", part)
    part.rename(scores)


def tokens_of(data: Path) -> int:
    return json.loads((data / "manifest.json").read_text())["splits"]["train"]["tokens"]


def tune(work: Path, order: str, seed: int, epochs: float, lr: float) -> None:
    """Trains the base model on the triplets in one of the orders."""
    names = GRADES[::-1] if order == "reversed" else GRADES
    data = [work / "data" / name for name in names]
    tokens = [round(epochs * tokens_of(one)) for one in data]
    name, how = f"{order}-{seed}", ("--seed", seed, "--optimizer.lr", lr)

    def length(total: int) -> tuple[object, ...]:
        warmup = max(total // TOKENS_A_STEP // 20, 1)
        steps = ("--schedule.train-steps", None, "--schedule.train-tokens", total)
        return (*steps, "--schedule.warmup-steps", warmup)

    if order == "restarted":
        begin = work / "runs" / "base"
        for number, (one, count) in enumerate(zip(data, tokens, strict=True)):
            stage = name if number == len(data) - 1 else f"{name}-{names[number]}"
            start = ("--init-from", begin, *how, *length(count))
            train(work, stage, [one], TUNE, *start)
            begin = work / "runs" / stage
        return
    start = ("--init-from", work / "runs" / "base", *how, *length(sum(tokens)))
    if order == "mixed":
        train(work, name, data, TUNE, *start)
        return
    blend = work / f"{order}.json"
    then = [tokens[0], 0, 1, 0, tokens[0] + tokens[1], 0, 0, 1]
    stages = ("--weights", 1, 0, 0, "--then", *then, "--train-tokens", sum(tokens))
    make(blend, "data", "blend", *data, *stages, "--output", blend)
    train(work, name, [], TUNE, "--config", blend, *start)


def scores_of(work: Path, name: str) -> dict[str, Any]:
    (file,) = (work / "scores" / name).glob("*.json")
    content = json.loads(file.read_text())
    (result,) = content["results"]
    return {**result, "step": content["step"]}


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """The lines of the table: what was scored, then chrF and BLEU of each seed."""
    base = found["base"][0]["metrics"]
    rows = [
        ["the drafts as they are", *(f"{base[f'draft_{m}']:.1f}" for m in ("chrf", "bleu")), ""],
        ["the model before", *(f"{base[m]:.1f}" for m in ("chrf", "bleu")), ""],
    ]
    for order, results in found.items():
        if order != "base":
            values = {m: [r["metrics"][m] for r in results] for m in ("chrf", "bleu")}
            cells = [
                f"{statistics.fmean(v):.1f} ({', '.join(f'{x:.1f}' for x in v)})"
                for v in values.values()
            ]
            rows.append([ORDERS[order], *cells, _beside(results, found.get("mixed"))])
    return rows


def _beside(results: list[dict[str, Any]], mixed: list[dict[str, Any]] | None) -> str:
    """chrF minus that of mixed data, seed by seed."""
    if mixed is None or mixed is results:
        return ""
    differences = [
        one["metrics"]["chrf"] - other["metrics"]["chrf"]
        for one, other in zip(results, mixed, strict=True)
    ]
    return f"{statistics.fmean(differences):+.1f} ({', '.join(f'{x:+.1f}' for x in differences)})"


def draw(found: dict[str, list[dict[str, Any]]]) -> Figure:
    """chrF of each seed by order, beside the drafts' own."""
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    axes = figure.subplots()
    orders = [order for order in found if order != "base"]
    for place, order in enumerate(orders):
        values = [result["metrics"]["chrf"] for result in found[order]]
        axes.plot(values, [place] * len(values), "o", color=COLOURS[0], alpha=0.6)
        axes.plot(statistics.fmean(values), place, "|", color=COLOURS[0], markersize=20)
    drafts = found["base"][0]["metrics"]["draft_chrf"]
    axes.axvline(drafts, color=COLOURS[1], linestyle="--")
    axes.annotate(" the drafts", (drafts, len(orders) - 0.55), color=COLOURS[1])
    axes.set_yticks(range(len(orders)), [ORDERS[order] for order in orders])
    axes.set_ylim(len(orders) - 0.4, -0.6)
    axes.set_xlabel("chrF of refined held-out drafts, one dot a seed")
    pictures.plain(axes)
    return figure


def main(words: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--picture", type=Path, help="draw the scores to this PNG")
    parser.add_argument("--catalogues", type=Path, nargs="+", help="in place of the packages'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--base-steps", type=int, default=1200)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    options: argparse.Namespace = parser.parse_args(words)
    work = options.work_dir
    packages = options.catalogues or triplets.folders_of(triplets.PACKAGES)
    prepare(work, packages, options.vocab_size, options.base_steps)
    for seed in options.seeds:
        for order in options.orders:
            tune(work, order, seed, options.epochs, options.lr)
    found = {"base": [scores_of(work, "base")]}
    for order in options.orders:
        found[order] = [scores_of(work, f"{order}-{seed}") for seed in options.seeds]
    titles = ["", "chrF", "BLEU", "chrF minus mixed"]
    print("\n" + facts.markdown(titles, rows_of(found)))
    packages_used = ("sacrebleu", "polib", *(() if options.catalogues else triplets.PACKAGES))
    lines = {p.stem: len(p.read_text().splitlines()) for p in (work / "text").glob("*.jsonl")}
    tokens = {name: tokens_of(work / "data" / name) for name in ("base", *GRADES, "held-out")}
    report = {"lines": lines, "tokens": tokens}
    header = facts.header("cpu", options, *packages_used)
    facts.write(options.json, {**header, **report, "results": found})
    if options.picture:
        pictures.save(options.picture, draw(found))


if __name__ == "__main__":
    main()
