"""Does FP8 learn as bf16 does? One small model, from one start on the same tokens, in each precision.

    python benchmarks/precision.py --precisions bf16 delayed tensorwise --steps 300 --picture FILE

The tokens are the bytes of text files (--text; this checkout's own by default). Losses are smoothed over
20 steps; the figure is the largest relative difference from the first precision's, after the first 50.
"""

import argparse
import gc
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_ladder.config import ParallelConfig
from pretrain.bench.precisions import PRECISIONS, precision_of
from pretrain.config import ScheduleConfig, TrainConfig
from pretrain.data import Batch
from pretrain.presets import PRESETS
from pretrain.run_log import versions
from pretrain.setup import build, start_ranks
from pretrain.step import train_step

SMOOTHED, AFTER = 20, 50  # steps
OURS = ("megatron_ladder", "pretrain", "data_prep", "slurm", "tests", "benchmarks")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16"])
    parser.add_argument("--residual", choices=("standard", "parallel", "ladder"), default="ladder")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--text", type=Path, nargs="+", help="files")
    parser.add_argument("--json", type=Path)
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
        pieces = torch.stack([text[s : s + length + 1] for s in starts.tolist()]).long()
        yield {
            "tokens": pieces[:, :-1],
            "labels": pieces[:, 1:],
            "loss_mask": torch.ones(size, length),
            "position_ids": torch.arange(length).expand(size, length),
        }


def train(precision: str, text: torch.Tensor, args: argparse.Namespace) -> list[float]:
    config = config_of(precision, args)
    torch.manual_seed(config.seed)
    model_parallel_cuda_manual_seed(config.seed)  # what weights are drawn from
    model, optimizer, scheduler = build(config)
    losses = []
    data = batches(config, text)
    for step in range(1, args.steps + 1):
        loss, _, _ = train_step(model, optimizer, scheduler, data, config)
        losses.append(loss)
        if step % 50 == 0:
            print(f"{precision}: step {step} of {args.steps}, loss {loss:.4f}", flush=True)
    del model, optimizer, scheduler
    gc.collect()
    return losses


def smoothed(losses: list[float]) -> list[float]:
    """Of each step, the mean of it and the steps before it, SMOOTHED at most."""
    sums = list(itertools.accumulate(losses, initial=0.0))
    return [(sums[i] - sums[max(0, i - SMOOTHED)]) / min(i, SMOOTHED) for i in range(1, len(sums))]


def largest_difference(losses: list[float], reference: list[float]) -> float:
    """Relative, of smoothed losses, after the first steps; nan when there are no more."""
    pairs = list(zip(smoothed(losses), smoothed(reference), strict=True))[AFTER:]
    return max((abs(a / b - 1) for a, b in pairs), default=math.nan)


def draw(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    styles = itertools.cycle(["-", "--", ":", "-."])  # they lie on one another
    for (name, losses), style in zip(curves.items(), styles, strict=False):
        axes.plot(range(1, len(losses) + 1), smoothed(losses), style, label=name)
    axes.set(xlabel="step", ylabel=f"loss, mean of {SMOOTHED} steps", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    args = arguments()
    device = start_ranks(config_of(args.precisions[0], args))
    text = text_of(args)
    curves = {precision: train(precision, text, args) for precision in args.precisions}
    reference = curves[args.precisions[0]]
    rows = {p: (c[-1], largest_difference(c, reference)) for p, c in curves.items()}
    print(f"| precision | last loss | largest difference from {args.precisions[0]} |")
    print("| --- | --- | --- |")
    for precision, (last, difference) in rows.items():
        print(f"| {precision} | {last:.4f} | {difference:.2%} |")
    if args.picture:
        draw(curves, args.picture)
    if args.json:
        facts = {
            "device": device,
            "versions": versions(),
            "options": {k: str(v) for k, v in vars(args).items() if k not in ("json", "picture")},
            "tokens": len(text),
            "largest_difference": {p: d for p, (_, d) in rows.items()},
            "losses": curves,
        }
        args.json.write_text(json.dumps(facts) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
