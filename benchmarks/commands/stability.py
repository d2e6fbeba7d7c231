"""What are z-loss, a ramp of the batch size and Muon worth, beside AdamW alone?

    python benchmarks/commands/stability.py --data DATA --work-dir DIR --json FILE --picture FILE [options]

AdamW and Muon are trained at each of --rates; z-loss and the ramp beside AdamW at --rate. All runs read the
same tokens in the same order from the same first weights. Each is a `megatron-ladder train`, and the same
command goes on where it was stopped. All other options are given to each `train`: sizes, batch, schedule.
Beside losses of held-out data this reads log^2 Z of the last steps. So that AdamW and Muon record it too,
their z-loss is weighed with 1e-12.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `measuring` is

from measuring import facts, pictures
from measuring.learning.runs import data_facts, read_run, smoothed, validation
from measuring.options import parser_of
from pretrain.config.train import load_config
from pretrain.pictures import COLOURS, si
from pretrain.run.metrics import read_metrics

RECORDED = 1e-12  # a weight of z-loss that records it, and trains nothing
LAST = 50  # steps whose log^2 Z is averaged


def ways(options: Any) -> dict[str, list[str]]:
    """Each run's name, and its options of `train`."""
    recorded = ["--optimizer.z-loss-coeff", str(RECORDED)]
    runs = {}
    for rate in options.rates:
        runs[f"AdamW, {rate}"] = ["--optimizer.lr", rate, *recorded]
        muon = ["--optimizer.optimizer", "muon", "--optimizer.lr", rate]
        runs[f"Muon, {rate}"] = [*muon, *recorded]
    rate = ["--optimizer.lr", options.rate]
    z_loss = ["--optimizer.z-loss-coeff", str(options.z_loss)]
    runs[f"AdamW with z-loss {options.z_loss:g}, {options.rate}"] = [*rate, *z_loss]
    ramp = ["--schedule.rampup-batch-size", *map(str, options.ramp)]
    runs[f"AdamW with a ramp, {options.rate}"] = [*rate, *ramp, *recorded]
    return runs


def train(folder: Path, data: Path, given: list[str]) -> None:
    command = ["train", "--data.paths", str(data), "--output-dir", str(folder), *given]
    print("$ megatron-ladder", *command, flush=True)
    subprocess.run([sys.executable, "-m", "pretrain.cli", *command], check=True)  # noqa: S603 (a list)


def figures(folder: Path, name: str) -> dict[str, Any]:
    """A finished run: steps, the losses of the held-out data, and log^2 Z at its end."""
    run, config = read_run(folder, name, seed=0), load_config(folder / "config.json")
    lines = [line for line in read_metrics(folder) if line["kind"] == "train"]
    last = [line["z_loss"] / config.optimizer.z_loss_coeff for line in lines[-LAST:]]
    return {
        "name": name,
        "steps": config.train_steps,
        "tokens": config.tokens_after(config.train_steps),
        "held_out": sorted(validation(run).items()),
        "training": sorted(smoothed(run).items()),
        "log_z_squared": statistics.fmean(last),
        "largest_gradient_norm_after_warm_up": max(
            line["grad_norm"] for line in lines if line["step"] > config.warmup_steps
        ),
        "seconds_training": run["seconds_training"],
        "versions": run["versions"],
    }


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """The best rate of AdamW and of Muon, and AdamW with z-loss and with a ramp."""
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for run, colour in zip(chosen(runs), COLOURS, strict=False):
        points = [(tokens, loss) for tokens, loss in run["held_out"] if tokens]
        label = f"{run['name']}: {points[-1][1]:.3f}"
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=label)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: si(tokens)))
    axes.set_ylabel("loss on held-out data, nats a token")
    pictures.plain(axes)
    axes.legend(frameon=False)
    pictures.save(path, figure)


def chosen(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best run of AdamW alone and of Muon, then all others."""
    best = [
        min((r for r in runs if r["name"].startswith(way)), key=lambda r: r["held_out"][-1][1])
        for way in ("AdamW,", "Muon,")
    ]
    return [*best, *(r for r in runs if " with " in r["name"])]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="such as quickstart/data")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--rates", nargs="+", default=["1e-3", "3e-3", "1e-2"])
    parser.add_argument("--rate", default="3e-3", help="of z-loss and the ramp; default 3e-3")
    parser.add_argument("--z-loss", type=float, default=1e-4)
    parser.add_argument("--ramp", type=int, nargs=3, default=[4, 4, 800])
    options, of_train = parser.parse_known_args()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    started = time.time()
    runs = []
    for number, (name, given) in enumerate(ways(options).items()):
        folder = options.work_dir / str(number)
        train(folder, options.data, [*of_train, *given])
        runs.append(figures(folder, name))
    rows = [
        [
            run["name"],
            f"{run['steps']:,}",
            f"{run['held_out'][-1][1]:.4f}",
            f"{run['log_z_squared']:.2f}",
            f"{run['largest_gradient_norm_after_warm_up']:.2f}",
        ]
        for run in runs
    ]
    heads = ["run", "steps", "held-out loss", "log^2 Z", "largest gradient norm"]
    print("\n" + facts.markdown(heads, rows))
    draw(runs, options.picture)
    report = {
        "seconds": round(time.time() - started),
        "data": data_facts(options.data),
        "runs": runs,
    }
    facts.write(options.json, {**facts.header("cpu", options), **report})


if __name__ == "__main__":
    main()
