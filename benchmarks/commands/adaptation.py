"""What does it cost to make half the layers of a trained model ladder layers, in different ways?

    python benchmarks/commands/adaptation.py --work-dir DIR --json FILE --picture FILE

A small standard model is trained on the source of Python's standard library. It is exported as a Hugging
Face folder and imported again, as a published model would be. Then half of its layers become ladder layers:
the last ones, or those whose change raises the loss least. Every variant and the unchanged model (the
control) train on, on the same sequences in the same order. Losses are of one held-out split. All steps are
`megatron-ladder` commands, and the same command goes on where it was stopped.
"""

import json
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `measuring` is

from measuring import facts, pictures
from measuring.options import parser_of
from pretrain.pictures import COLOURS, GREY

TEXT = [sysconfig.get_paths()["stdlib"], "--include", "*.py", "--exclude", "*/site-packages/*"]
LAYERS, LADDER = 8, 4
BASE_STEPS, STEPS, SEEDS = 800, 200, (1, 2)
TRAINING = f"""--schedule.train-tokens None --schedule.train-steps {STEPS} --schedule.warmup-steps 20
    --optimizer.lr 1e-3 --precision fp32 --micro-batch-size 8 --global-batch-size 8
    --data.seq-length 256 --data.num-workers 0 --eval-interval 20 --eval-sequences 400
    --save-interval 100 --log-interval 5"""
LAST = f"--preset adapt --ladder-layers last:{LADDER}"
# By name: what it is called, and its options.
WAYS = {
    "control": ("not changed (control)", "--preset adapt-control"),
    "last": (f"last {LADDER}", LAST),
    "auto": (f"auto:{LADDER}", f"--preset adapt --ladder-layers auto:{LADDER}"),
    "last-gradual": (f"last {LADDER}, gradually", f"{LAST} --adapt.gradual-steps 100"),
    "last-distilled": (f"last {LADDER}, distilled", f"{LAST} --adapt.distillation-weight 0.5"),
}


def run(*command: str) -> None:
    print("$ megatron-ladder", *command, flush=True)
    subprocess.run([sys.executable, "-m", "pretrain.cli", *command], check=True)  # noqa: S603 (a list)


def prepare(work: Path) -> None:
    """Data, the base model as a Hugging Face folder, and its import."""
    tokenizer = work / "tokenizer"
    if not tokenizer.is_dir():
        size = ["--vocab-size", "4096", "--max-training-bytes", "4000000"]
        run("data", "train-tokenizer", *TEXT, *size, "--output-dir", str(tokenizer))
    tokenize(tokenizer / "tokenizer.model", work / "data")
    run(
        *("train", "--preset", "tiny", "--model.residual", "standard"),
        *("--model.num-layers", str(LAYERS), "--parallel.tensor-model-parallel-size", "1"),
        *("--schedule.train-steps", str(BASE_STEPS), "--eval-sequences", "400"),
        *("--data.paths", str(work / "data"), "--output-dir", str(work / "base")),
    )
    if not (work / "published").is_dir():
        run("export", str(work / "base"), str(work / "published"))
    if not (work / "imported").is_dir():
        # By its own tokenizer, as for a model of somebody else's.
        tokenize(work / "published/tokenizer.json", work / "again")
        # `auto` measures the layers; each run chooses its own from what was measured.
        auto = ["--ladder-layers", f"auto:{LADDER}", "--sample", str(work / "again")]
        run("import", str(work / "published"), str(work / "imported"), *auto)


def tokenize(tokenizer: Path, data: Path) -> None:
    how = ["--tokenizer", str(tokenizer), "--validation-fraction", "0.02"]
    run("data", "tokenize", *TEXT, *how, "--output-dir", str(data))


def adapt(work: Path, name: str, seed: int) -> list[dict[str, Any]]:
    """Trains one way; returns its validations."""
    out = work / f"{name}-{seed}"
    run(
        *("train", *WAYS[name][1].split(), "--init-from", str(work / "imported")),
        *("--data.paths", str(work / "again"), "--output-dir", str(out)),
        *("--seed", str(seed), *TRAINING.split()),
    )
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "validation"]


def draw(curves: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Each seed draws other held-out sequences, so losses are shown less that of the unchanged model."""
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color=GREY, linestyle=":", label="the model as it was")
    before = [lines[0]["loss"] for lines in curves["control"]]
    for (name, seeds), colour in zip(curves.items(), COLOURS, strict=False):
        tokens = [line["tokens"] / 1000 for line in seeds[0]]
        for number, lines in enumerate(seeds):
            losses = [line["loss"] - before[number] for line in lines]
            label = WAYS[name][0] if number == 0 else None
            style = "-" if number == 0 else "--"
            axes.plot(tokens, losses, style, color=colour, marker="o", markersize=3, label=label)
    axes.set_xlabel("thousand tokens trained on since the change")
    axes.set_ylabel("validation loss, less that before; nats a token")
    pictures.plain(axes)
    axes.legend(frameon=False)
    pictures.save(path, figure)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    options = parser.parse_args()
    work, started = options.work_dir, time.time()
    work.mkdir(parents=True, exist_ok=True)
    prepare(work)
    curves = {name: [adapt(work, name, seed) for seed in SEEDS] for name in WAYS}
    staleness = json.loads((work / "imported/staleness.json").read_text())
    rows, lines = [], []
    for name, seeds in curves.items():
        after = [found[-1]["loss"] for found in seeds]
        control = [found[-1]["loss"] for found in curves["control"]]
        more = [a - c for a, c in zip(after, control, strict=True)]
        rows.append({"way": name, "at_change": seeds[0][0]["loss"], "after": after, "more": more})
        losses = ", ".join(f"{a:.4f}" for a in after), ", ".join(f"{m:+.4f}" for m in more)
        lines.append([WAYS[name][0], f"{seeds[0][0]['loss']:.4f}", *losses])
    titles = [f"{LADDER} of {LAYERS} layers made ladder", "at the change"]
    print("\n" + facts.markdown([*titles, f"after, seeds {SEEDS}", "- control"], lines))
    draw(curves, options.picture)
    report = {
        "seconds": round(time.time() - started),
        "rows": rows,
        "staleness": staleness,
        "curves": curves,
    }
    facts.write(options.json, {**facts.header("cpu", options, "transformers"), **report})


if __name__ == "__main__":
    main()
