"""Does a ladder model learn as well as a standard and a parallel one? Trains them side by side.

    python benchmarks/learning.py --data DATA --work-dir DIR --json FILE --picture FILE [options of `train`]

For each seed, one run of each kind: the same tokens in the same order, the same schedule, the same first
weights. Each is an ordinary `megatron-ladder train` into a run folder of --work-dir, so the same command
goes on where it was stopped, and only draws again when all is trained. All other options are given to each
`train`: sizes, batch, learning rate, layout, precision. Results are written after each seed.

The picture's right half puts the losses against the time that a large shape (--target) would take for as
many tokens on one node of 8 GPUs at TP 8. That time is modelled by the planner (pretrain/bench), not
measured, and says nothing of what the large shape would learn.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megatron_ladder.errors import UserError
from pretrain.bench.links import NVLINK
from pretrain.bench.plan import DEVICES, Hardware, Row
from pretrain.bench.plan_search import KINDS, search
from pretrain.config import load_config
from pretrain.data import open_folder
from pretrain.files import write_atomically
from pretrain.metrics import read_metrics
from pretrain.plots import COLOURS, png_bytes, si, smooth
from pretrain.presets import PRESETS

GPUS = TP = 8  # of the modelled node
OURS = (
    *("--model.residual", "--model.ladder-layers", "--ladder-layers", "--init-from", "--seed"),
    *("--data.paths", "--output-dir", "--schedule.train-steps", "--schedule.train-tokens"),
)
UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
Run = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Other options are those of `megatron-ladder train`, given to each run.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="data set folders")
    parser.add_argument("--work-dir", type=Path, required=True, help="for the run folders")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True, help="PNG")
    parser.add_argument("--preset", default="tiny", help="of `train`; default tiny")
    parser.add_argument(
        "--train-tokens", type=int, default=1_500_000, help="of each run; default 1_500_000"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="default 1 2")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--target", choices=PRESETS, default="llama-3-8b", help="whose time is modelled"
    )
    parser.add_argument("--device", choices=DEVICES, default="h100", help="that it is modelled on")
    options, of_train = parser.parse_known_args()
    try:
        return compare(options, of_train)
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'the operating system'}: {error.strerror or error}"
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"learning.py: {message}", file=sys.stderr)
    return 2


def compare(options: argparse.Namespace, of_train: list[str]) -> int:
    """Trains what is not trained yet, and writes the results. Returns the exit status."""
    for option in of_train:
        if option.split("=")[0].replace("_", "-") in OURS:
            raise UserError(f"{option} is not to be given: this benchmark sets it for each run")
    for path in options.data:
        if not open_folder(path).tokens("validation"):
            raise UserError(
                f"{path} has no validation split: tokenize it with --validation-fraction 0.01"
            )
    plan = modelled(options.target, options.device)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    for file in (options.json, options.picture):
        file.parent.mkdir(parents=True, exist_ok=True)

    kinds, seeds = list(dict.fromkeys(options.kinds)), list(dict.fromkeys(options.seeds))
    runs: dict[str, list[Run]] = {kind: [] for kind in kinds}
    number = 0
    for seed in seeds:
        for kind in kinds:
            number += 1
            print(f"== {kind}, seed {seed}: run {number} of {len(kinds) * len(seeds)}", flush=True)
            run_dir = options.work_dir / f"{kind}-seed{seed}"
            if status := train(options, of_train, kind, seed, run_dir):
                return status
            runs[kind].append(read_run(run_dir, kind, seed))
        write_results(options, of_train, runs, plan)
    return 0


def train(
    options: argparse.Namespace, of_train: list[str], kind: str, seed: int, run_dir: Path
) -> int:
    """One run, to its end. Returns the exit status of `train`, which has said what was wrong."""
    command = [
        *("--preset", options.preset, "--eval-sequences", "None", *of_train),
        *("--schedule.train-steps", "None", "--schedule.train-tokens", str(options.train_tokens)),
        *("--data.paths", *map(str, options.data), "--output-dir", str(run_dir)),
        *("--model.residual", kind, "--seed", str(seed)),
    ]
    status = subprocess.run(  # noqa: S603 (a list)
        [sys.executable, "-m", "pretrain.cli", "train", *command]
    ).returncode
    if status:
        print(f"learning.py: training ended with exit status {status}", file=sys.stderr)
    return status


def read_run(run_dir: Path, kind: str, seed: int) -> Run:
    """A finished run's curves, as columns, and what it was."""
    lines = read_metrics(run_dir)
    start = next(line for line in lines if line["kind"] == "start")
    training = [line for line in lines if line["kind"] == "train"]
    config = load_config(run_dir / "config.json")
    return {
        "kind": kind,
        "seed": seed,
        "device": start["device"],
        "ranks": start["world_size"],
        "versions": start["versions"],
        "parameters": start["parameters"],
        "parameters_without_embeddings": config.model.num_parameters(embeddings=False),
        "tokens_per_step": start["tokens_per_step"],
        "seconds_training": round(training[-1]["time"]),
        "tokens_per_second": round(statistics.median(m["tokens_per_second"] for m in training)),
        "unigram_loss": {m["dataset"]: m["unigram_loss"] for m in lines if m["kind"] == "baseline"},
        "training": columns(training),
        "validation": {
            dataset: columns([m for m in lines if m.get("dataset") == dataset and "step" in m])
            for dataset in sorted({m["dataset"] for m in lines if m["kind"] == "validation"})
        },
    }


def columns(lines: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Step, tokens and loss of lines of metrics."""
    return {
        "step": [line["step"] for line in lines],
        "tokens": [line["tokens"] for line in lines],
        "loss": [round(line["loss"], 5) for line in lines],
    }


def by_tokens(column: dict[str, list[Any]]) -> dict[int, float]:
    return dict(zip(column["tokens"], column["loss"], strict=True))


def smoothed(run: Run) -> dict[int, float]:
    """Its training loss, by tokens."""
    training = run["training"]
    return dict(zip(training["tokens"], smooth(training["loss"]), strict=True))


def validation(run: Run) -> dict[int, float]:
    """Its validation loss, by tokens; of several data sets the mean."""
    tokens, mean, _, _ = mean_and_spread([by_tokens(c) for c in run["validation"].values()])
    return dict(zip(tokens, mean, strict=True))


def last_loss(run: Run) -> float:
    losses = validation(run)
    return losses[max(losses)]


def mean_and_spread(
    curves: list[dict[int, float]],
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Where all curves have a point: the place, their mean, their lowest and their highest."""
    places = sorted(set.intersection(*map(set, curves)))
    points = [[curve[place] for curve in curves] for place in places]
    return (
        places,
        [statistics.fmean(p) for p in points],
        [min(p) for p in points],
        [max(p) for p in points],
    )


def modelled(target: str, device: str) -> dict[str, dict[str, Row]]:
    """For each kind: the fastest TP 8 layout of the target on 8 GPUs, and the fastest of all."""
    config = PRESETS[target]()
    model = config.model
    if model.vocab_size is None:
        model = replace(model, vocab_size=32_000)
    config = replace(config, model=model, precision="bf16")
    try:
        found = search(config, GPUS, Hardware(DEVICES[device], NVLINK))
    except UserError as error:
        raise UserError(f"--target {target} on {GPUS} x {device}: {error}") from error
    plan = {}
    for kind, rows in found.items():
        at_tp = [row for row in rows if row.tp == TP]
        if not at_tp:
            raise UserError(
                f"--target {target} has no layout at TP {TP} that fits in {device}: choose another"
            )
        plan[str(kind)] = {"at_tp8": at_tp[0], "fastest": rows[0]}
    return plan


def write_results(
    options: argparse.Namespace,
    of_train: list[str],
    runs: dict[str, list[Run]],
    plan: dict[str, dict[str, Row]],
) -> None:
    """The table on the screen, the JSON and the picture of the seeds that are done."""
    rows = table(runs, plan)
    a_run = next(iter(runs.values()))[0]
    seeds = ", ".join(map(str, rows[0]["seeds"]))
    print(
        f"\n| | parameters | validation loss, seeds {seeds} | mean | less {rows[0]['kind']}'s, by seed "
        "| time, modelled |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['kind']} | {row['parameters']:,} | "
            + ", ".join(f"{loss:.4f}" for loss in row["losses"])
            + f" | {row['mean']:.4f} | "
            + ", ".join(f"{more:+.4f}" for more in row["less_the_firsts"])
            + f" | {row['modelled_time']:.3f} |"
        )
    print(flush=True)
    result = {
        "command": command(options, of_train),
        "device": f"{a_run['ranks']} x {a_run['device']} ({platform.machine()})",
        "versions": a_run["versions"],
        "data": [facts(path) for path in options.data],
        "tokens": a_run["training"]["tokens"][-1],
        "rows": rows,
        "about_parameters": "kinds differ in norms alone: parallel has one a layer, the others two",
        "about_losses": "nats a token of the whole validation split; of several data sets the mean",
        "modelled": {
            "about": "by the planner (pretrain/bench/plan_search.py), not measured",
            "target": options.target,
            "device": f"{GPUS} x {options.device}",
            "kinds": {
                kind: {name: layout(row) for name, row in plan[kind].items()} for kind in runs
            },
        },
        "runs": [run for of_kind in runs.values() for run in of_kind],
    }
    text = json.dumps(result, indent=1)
    # A curve on a line.
    text = re.sub(r"\[[^][{}]*\]", lambda m: " ".join(m.group().split()), text)
    write_atomically(options.json, text + "\n")
    write_atomically(options.picture, draw(options, runs, plan))


def table(runs: dict[str, list[Run]], plan: dict[str, dict[str, Row]]) -> list[dict[str, Any]]:
    """Final validation losses by kind, against the first kind's of the same seed, and the modelled time in
    units of the first's."""
    first = next(iter(runs))
    rows = []
    for kind, of_kind in runs.items():
        last = [last_loss(run) for run in of_kind]
        firsts = [last_loss(run) for run in runs[first]]
        rows.append(
            {
                "kind": kind,
                "parameters": of_kind[0]["parameters"],
                "seeds": [run["seed"] for run in of_kind],
                "losses": [round(loss, 5) for loss in last],
                "mean": round(statistics.fmean(last), 5),
                "less_the_firsts": [round(a - b, 5) for a, b in zip(last, firsts, strict=True)],
                "modelled_time": round(
                    plan[kind]["at_tp8"].step_s / plan[first]["at_tp8"].step_s, 4
                ),
            }
        )
    return rows


def command(options: argparse.Namespace, of_train: list[str]) -> str:
    """What was asked for, without this machine's paths."""
    words = [
        *("python benchmarks/learning.py --data", *(path.name for path in options.data)),
        *("--work-dir WORK --json FILE --picture FILE --preset", options.preset),
        *("--train-tokens", options.train_tokens, "--seeds", *options.seeds),
        *("--kinds", *options.kinds, "--target", options.target, "--device", options.device),
        *(Path(word).name if "/" in word else word for word in of_train),
    ]
    return " ".join(map(str, words))


def facts(path: Path) -> dict[str, Any]:
    """A data set's name and size."""
    folder = open_folder(path)
    return {
        "name": folder.name,
        "vocab_size": folder.tokenizer["vocab_size"],
        "training_tokens": folder.tokens("train"),
        "validation_tokens": folder.tokens("validation"),
    }


def layout(row: Row) -> dict[str, Any]:
    """A modelled layout, in short."""
    return {
        "tp": row.tp,
        "pp": row.pp,
        "dp": row.dp,
        "sequence_parallel": row.sequence_parallel,
        "micro_batch_size": row.micro_batch_size,
        "recompute": row.recompute,
        "step_s": round(row.step_s, 3),
        "exposed_tp_s": round(row.exposed_tp_s, 3),
        "tokens_per_s": round(row.tokens_per_s_per_gpu * GPUS),
        "memory_gb": round(row.memory_gb, 1),
    }


def draw(
    options: argparse.Namespace, runs: dict[str, list[Run]], plan: dict[str, dict[str, Row]]
) -> bytes:
    """Left: loss against tokens. Right: the same losses against the modelled time."""
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    token_s = {kind: 1 / (plan[kind]["at_tp8"].tokens_per_s_per_gpu * GPUS) for kind in runs}
    a_run = next(iter(runs.values()))[0]
    longest = a_run["training"]["tokens"][-1] * max(token_s.values())
    unit, name = next(u for u in UNITS if longest > 2 * u[0] or u[0] == 1)
    shown: list[float] = []
    for kind, of_kind in runs.items():
        colour = dict(zip(map(str, KINDS), COLOURS, strict=False))[kind]
        tokens, mean, low, high = mean_and_spread([smoothed(run) for run in of_kind])
        at, v_mean, v_low, v_high = mean_and_spread([validation(run) for run in of_kind])
        label = f"{kind}: {v_mean[-1]:.3f}"
        if len(of_kind) > 1:
            label += f" ({v_low[-1]:.3f} to {v_high[-1]:.3f})"
        for axes, scale in ((left, 1.0), (right, token_s[kind] / unit)):
            x = [t * scale for t in tokens]
            axes.plot(x, mean, color=colour, linewidth=1)
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            # A point, and the seeds' range as a bar through it.
            axes.plot([t * scale for t in at], v_mean, "o", color=colour, markersize=4, label=label)
            axes.vlines([t * scale for t in at], v_low, v_high, color=colour)
        shown += v_low + v_high
    left.set_ylabel("loss, nats a token")
    left.set_xlabel("tokens trained on")
    left.set_title("Measured. Lines: training, smoothed. Points: validation", fontsize=10)
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
    right.set_xlabel(
        f"{name} that {options.target} would take for as many tokens on {GPUS} x {options.device}, TP {TP}"
    )
    right.set_title(
        "The same losses against a large shape's wall-clock: MODELLED, not measured", fontsize=10
    )
    # The first steps would squeeze the rest.
    margin = 0.08 * (max(shown) - min(shown)) + 0.01
    for axes in (left, right):
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
        axes.set_xlim(left=0)
        axes.grid(True, color="#e6e6e6")
        axes.spines[["top", "right"]].set_visible(False)
    seeds = len(next(iter(runs.values())))
    title = "validation loss at the end" + (f", mean of {seeds} seeds" if seeds > 1 else "")
    left.legend(frameon=False, fontsize=9, title=title)
    return png_bytes(figure)


if __name__ == "__main__":
    sys.exit(main())
