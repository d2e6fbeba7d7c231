"""Does a model learn in FP8 as it does in bf16?

    python benchmarks/precision.py --precisions bf16 delayed tensorwise --steps 300 --picture FILE

A small model is trained in each precision, from the same first weights and on the same tokens. The tokens
are the bytes of text files (--text; this checkout's own by default). Losses are smoothed over 20 steps.
Given is the largest relative difference from the first precision's loss, after the first 50 steps.
"""

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import measuring  # noqa: F401  # isort: skip (before megatron-core: which cuDNN is loaded)
import torch
from matplotlib.figure import Figure
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from measuring import facts
from measuring.batches import batch_of
from measuring.options import parser_of
from measuring.pictures import save
from measuring.precisions import PRECISIONS, precision_of
from measuring.rows import Rows
from megatron_ladder.config import ParallelConfig
from pretrain.config.presets import PRESETS
from pretrain.config.schedule import ScheduleConfig
from pretrain.config.train import TrainConfig
from pretrain.data.batches import Batch
from pretrain.loop.step import train_step
from pretrain.model.setup import build, start_ranks

SMOOTHED, AFTER = 20, 50  # steps
OURS = ("megatron_ladder", "pretrain", "data_prep", "slurm", "tests", "benchmarks")


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16"])
    parser.add_argument("--residual", choices=("standard", "parallel", "ladder"), default="ladder")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--text", type=Path, nargs="+", help="files")
    parser.add_argument("--picture", type=Path)
    return parser.parse_args()


def config_of(precision: str, args: argparse.Namespace) -> TrainConfig:
    number_format, fp8 = precision_of(precision)
    config = PRESETS["tiny"]()
    model = replace(
        config.model,
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=3 * args.hidden_size,
        residual=args.residual,
        vocab_size=256,
    )
    return replace(
        config,
        model=model,
        parallel=ParallelConfig(),
        optimizer=replace(config.optimizer, lr=1e-3),
        schedule=ScheduleConfig(train_steps=args.steps, warmup_steps=min(20, args.steps // 4)),
        precision=number_format,
        fp8=fp8,
    )


def text_of(args: argparse.Namespace) -> torch.Tensor:
    root = Path(__file__).parents[1]
    ours = [f for folder in OURS for f in (root / folder).rglob("*.py")]
    files = args.text or sorted([*ours, *root.glob("docs/*.md")])
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)


def batches(config: TrainConfig, text: torch.Tensor) -> Iterator[Batch]:
    """Pieces at random places, the same for every precision."""
    generator = torch.Generator().manual_seed(config.seed)
    size, length = config.micro_batch_size, config.data.seq_length
    while True:
        starts = torch.randint(0, len(text) - length - 1, (size,), generator=generator)
        yield batch_of(torch.stack([text[s : s + length + 1] for s in starts.tolist()]).long())


def train(precision: str, text: torch.Tensor, args: argparse.Namespace) -> tuple[list[float], str]:
    """The losses, and which attention was taken."""
    config = config_of(precision, args)
    torch.manual_seed(config.seed)
    model_parallel_cuda_manual_seed(config.seed)  # what weights are drawn from
    model, optimizer, scheduler = build(config)
    losses = []
    data = batches(config, text)
    for step in range(1, args.steps + 1):
        loss, *_ = train_step(model, optimizer, scheduler, data, config)
        losses.append(loss)
        if step % 50 == 0:
            print(f"{precision}: step {step} of {args.steps}, loss {loss:.4f}", flush=True)
    return losses, facts.attention_of(model[0])


def smoothed(losses: list[float]) -> list[float]:
    """Of each step, the mean of it and the steps before it, SMOOTHED at most."""
    sums = list(itertools.accumulate(losses, initial=0.0))
    return [(sums[i] - sums[max(0, i - SMOOTHED)]) / min(i, SMOOTHED) for i in range(1, len(sums))]


def largest_difference(losses: list[float], reference: list[float]) -> float:
    """Relative, of smoothed losses, after the first steps; nan when there are no more."""
    pairs = list(zip(smoothed(losses), smoothed(reference), strict=True))[AFTER:]
    return max((abs(a / b - 1) for a, b in pairs), default=math.nan)


def draw(curves: dict[str, list[float]], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    styles = itertools.cycle(["-", "--", ":", "-."])  # the curves lie on one another
    for (name, losses), style in zip(curves.items(), styles, strict=False):
        axes.plot(range(1, len(losses) + 1), smoothed(losses), style, label=name)
    axes.set(xlabel="step", ylabel=f"loss, mean of {SMOOTHED} steps", yscale="log")
    axes.legend()
    save(path, figure)


def main() -> None:
    args = arguments()
    device = start_ranks(config_of(args.precisions[0], args))
    text = text_of(args)
    first = args.precisions[0]
    curves: dict[str, list[float]] = {}
    rows = Rows(device, args)
    rows.besides = {"tokens": len(text), "losses": curves}
    for precision in args.precisions:
        with rows.case(precision=precision):
            curves[precision], attention = train(precision, text, args)
            rows.append({"precision": precision, "attention": attention, **facts.peak_memory()})
            rows.besides["largest_difference"] = differences(curves, first)
    if args.picture and curves:
        draw(curves, args.picture)
    rows.end(table(curves, rows, first))


def differences(curves: dict[str, list[float]], first: str) -> dict[str, float]:
    """From the first precision's curve; none where that is missing."""
    if first not in curves:
        return {}
    return {p: largest_difference(losses, curves[first]) for p, losses in curves.items()}


def table(curves: dict[str, list[float]], rows: list[dict[str, Any]], first: str) -> str:
    found = differences(curves, first)
    lines = []
    for row in rows:
        precision = row["precision"]
        cells = [row["error"]] if "error" in row else [f"{curves[precision][-1]:.4f}"]
        lines.append(
            [precision, *cells, *([f"{found[precision]:.2%}"] if precision in found else [])]
        )
    return facts.markdown(["precision", "last loss", f"largest difference from {first}"], lines)


if __name__ == "__main__":
    main()
