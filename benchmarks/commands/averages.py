"""What is an average of weights worth, beside a learning rate that goes down?

    python benchmarks/commands/averages.py --data DATA --work-dir DIR --json FILE --picture FILE [options]

A trunk is trained at a constant learning rate (WSD without its decay), and keeps an average of its weights
(EMA). At each of the budgets, in steps, four models that have read as many tokens are compared: the trunk's
checkpoint, its EMA, the mean of its last checkpoints (`merge`), and a branch that goes down over the last
fifth of the budget. All are `megatron-ladder` commands, and the same command goes on where it was stopped.
Losses are of the same held-out documents, by the code of `eval`. All other options are given to the trunk's
`train`: sizes, batch, learning rate.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `measuring` is

from measuring import facts, pictures
from measuring.options import parser_of
from pretrain.config.train import load_config
from pretrain.convert.plain_model import load_plain_model
from pretrain.data.folders import open_folder
from pretrain.evaluation.documents import Documents, open_split
from pretrain.evaluation.perplexity import measure_perplexity
from pretrain.pictures import COLOURS, si
from pretrain.run.folder import checkpoint_at

EVERY = 15  # steps between checkpoints
MERGED = 5  # checkpoints in a mean
DECAYED = 0.2  # the share of a budget in which the branch goes down
WAYS = {
    "trunk": "trunk, constant rate",
    "ema": "its EMA",
    "merge": f"mean of its last {MERGED} checkpoints",
    "decay": "branch that goes down",
}


def run(*command: str) -> None:
    print("$ megatron-ladder", *command, flush=True)
    subprocess.run([sys.executable, "-m", "pretrain.cli", *command], check=True)  # noqa: S603 (a list)


def loss_of(model: Path, documents: Documents, seq_length: int) -> float:
    plain = load_plain_model(model)
    return measure_perplexity(plain.model, documents, seq_length, 8)["metrics"]["loss"]


def train_trunk(options: Any, of_train: list[str]) -> Path:
    trunk = options.work_dir / "trunk"
    steps = max(options.budgets)
    run(
        *("train", "--preset", options.preset, "--parallel.tensor-model-parallel-size", "1"),
        *("--data.paths", str(options.data), "--output-dir", str(trunk)),
        *("--schedule.train-steps", str(steps), "--schedule.decay", "wsd"),
        *("--schedule.wsd-decay-fraction", "0"),
        *("--optimizer.ema-decay", str(options.ema_decay), "--save-interval", str(EVERY)),
        *("--keep-last", str(steps // EVERY), "--eval-interval", "0", "--eval-sequences", "32"),
        *("--no-tensorboard", *of_train),
    )
    return trunk


def at_budget(options: Any, trunk: Path, budget: int) -> dict[str, Path]:
    """The four models of a budget."""
    work, checkpoint = options.work_dir, checkpoint_at(trunk, budget)
    ema, mean, decay = (work / f"{name}-{budget}" for name in ("ema", "mean", "decay"))
    run("export", str(checkpoint), str(ema), "--weights", "ema")
    steps = [str(budget - EVERY * n) for n in range(MERGED)]
    run("merge", str(trunk), "--steps", *steps, "--output-dir", str(mean))
    down = round(budget * DECAYED)
    run(
        *("train", "--branch-from", f"{trunk}@{budget - down}", "--output-dir", str(decay)),
        *("--schedule.train-steps", str(budget), "--schedule.wsd-decay-steps", str(down)),
        *("--schedule.min-lr-fraction", "0", "--keep-last", "2"),
    )
    return {"trunk": checkpoint, "ema": ema, "merge": mean, "decay": decay}


def draw(curve: list[tuple[int, float]], rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        *zip(*curve, strict=True), color=COLOURS[0], marker="o", markersize=3, label=WAYS["trunk"]
    )
    looks = zip(list(WAYS.items())[1:], COLOURS[1:], "s^D", strict=False)
    for (way, label), colour, marker in looks:
        points = [(row["tokens"], row["losses"][way]) for row in rows]
        if way == "decay":
            for row, end in zip(rows, points, strict=True):
                begin = (row["decay_from_tokens"], dict(curve).get(row["decay_from_tokens"]))
                axes.plot(*zip(begin, end, strict=True), color=colour, linestyle=":", linewidth=1)
        style: dict[str, Any] = {"markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.6}
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=marker,
            linestyle="",
            label=label,
            **style,
        )
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: si(tokens)))
    axes.set_ylabel("loss on held-out documents, nats a token")
    low = min(min(row["losses"].values()) for row in rows)
    first = next(loss for tokens, loss in curve if tokens >= rows[0]["tokens"] / 2)
    axes.set_ylim(low - 0.1, first + 0.1)
    pictures.plain(axes)
    axes.legend(frameon=False)
    pictures.save(path, figure)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="such as quickstart/data")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--budgets", type=int, nargs="+", default=[150, 300], help="steps")
    parser.add_argument("--preset", default="tiny", help="of the trunk; default tiny")
    parser.add_argument("--ema-decay", type=float, default=0.98)
    parser.add_argument("--tokens", type=int, default=40_000, help="held out, for each loss")
    options, of_train = parser.parse_known_args()
    for budget in options.budgets:
        if (budget - round(budget * DECAYED)) % EVERY or budget % EVERY:
            parser.error(f"--budgets {budget}: a branch would begin between two checkpoints")
    options.work_dir.mkdir(parents=True, exist_ok=True)
    started = time.time()
    trunk = train_trunk(options, of_train)
    config = load_config(trunk / "config.json")
    documents = open_split(open_folder(options.data), "validation").at_most(options.tokens, 1)
    length = config.data.seq_length
    steps = range(2 * EVERY, max(options.budgets) + 1, 2 * EVERY)
    curve = [
        (config.tokens_after(s), loss_of(checkpoint_at(trunk, s), documents, length)) for s in steps
    ]
    rows, lines = [], []
    for budget in sorted(options.budgets):
        models = at_budget(options, trunk, budget)
        losses = {way: loss_of(model, documents, length) for way, model in models.items()}
        begin = config.tokens_after(budget - round(budget * DECAYED))
        tokens = config.tokens_after(budget)
        rows.append(
            {"steps": budget, "tokens": tokens, "decay_from_tokens": begin, "losses": losses}
        )
        lines.append([f"{budget} ({tokens:,})", *(f"{losses[way]:.4f}" for way in WAYS)])
    print("\n" + facts.markdown(["steps (tokens)", *WAYS.values()], lines))
    draw(curve, rows, options.picture)
    report = {
        "seconds": round(time.time() - started),
        "held_out_tokens": documents.tokens,
        "curve": curve,
        "rows": rows,
    }
    facts.write(options.json, {**facts.header("cpu", options), **report})


if __name__ == "__main__":
    main()
