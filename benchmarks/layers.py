"""Ladder layers beside megatron-core's on one device, without tensor parallelism: what the ladder costs.

    python benchmarks/layers.py --shapes paper-1b llama-3-8b --precisions bf16 tensorwise --json FILE

Measured: forward and backward of a few layers, every kind and precision in turn, repetition by repetition.
The quotients are of pairs in one repetition.
"""

import argparse
import gc
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ladder.config import ModelConfig, ParallelConfig
from pretrain.bench.decoder import Decoder
from pretrain.bench.interleaved import measure
from pretrain.bench.precisions import PRECISIONS, precision_of
from pretrain.bench.ranks import join
from pretrain.metrics import flops_per_token, peak_flops
from pretrain.presets import PRESETS
from pretrain.run_log import versions

KINDS = ("standard", "parallel", "ladder")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=PRESETS, default=["paper-1b", "llama-3-8b"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192, help="in micro-batches of a shape")
    parser.add_argument("--steps", type=int, default=30, help="interleaved repetitions")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def shape_of(name: str, layers: int) -> tuple[ModelConfig, int]:
    """A preset's layers, and its sequence length."""
    config = PRESETS[name]()
    model = replace(config.model, num_layers=layers, vocab_size=128, ladder_layers=None)
    return model, config.data.seq_length


def compare(shape: str, args: argparse.Namespace, peak: float | None) -> list[dict[str, Any]]:
    """Every kind and precision of one shape."""
    model, seq_length = shape_of(shape, args.layers)
    batch = max(1, args.tokens // seq_length)
    runs = {}
    for precision in args.precisions:
        for kind in KINDS:
            number_format, fp8 = precision_of(precision)
            decoder = Decoder(
                replace(model, residual=kind),
                ParallelConfig(),
                micro_batch_size=batch,
                seq_length=seq_length,
                precision=number_format,
                fp8=fp8,
            )
            runs[precision, kind] = decoder.step
    times = measure(runs, args.steps)
    matmul = model.num_parameters(embeddings=False) - model.hidden_size
    flops = (
        batch
        * seq_length
        * flops_per_token(
            num_layers=args.layers,
            hidden_size=model.hidden_size,
            seq_length=seq_length,
            matmul_parameters=matmul,
        )
    )
    rows = []
    for (precision, kind), found in times.items():
        own = [sum(t) for t in found]
        standard = [sum(t) for t in times[precision, "standard"]]
        first = [sum(t) for t in times[args.precisions[0], kind]]
        over_standard = [a / b for a, b in zip(own, standard, strict=True)]
        low, middle, high = statistics.quantiles(over_standard, n=4)
        seconds = statistics.median(own)
        rows.append(
            {
                "shape": shape,
                "precision": precision,
                "kind": kind,
                "tokens": batch * seq_length,
                "ms": 1e3 * seconds,
                "forward_ms": 1e3 * statistics.median(t[0] for t in found),
                "over_standard": middle,
                "quartiles": [low, high],
                f"times_{args.precisions[0]}s_speed": statistics.median(
                    a / b for a, b in zip(first, own, strict=True)
                ),
                "tflops": flops / seconds / 1e12,
                "share_of_bf16_peak": flops / seconds / peak if peak else None,
            }
        )
    return rows


def table(rows: list[dict[str, Any]], first: str) -> str:
    lines = [
        "| shape | precision | kind | ms | over standard | quartiles | TFLOP/s | speed over "
        f"{first} |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, high = row["quartiles"]
        lines.append(
            f"| {row['shape']} | {row['precision']} | {row['kind']} | {row['ms']:.2f} | "
            f"{row['over_standard']:.3f} | {low:.3f} to {high:.3f} | {row['tflops']:.1f} | "
            f"{row[f'times_{first}s_speed']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    device = join(1, fake=True)
    peak = None if device == "cpu" else peak_flops(device)
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        rows += compare(shape, args, peak)
        gc.collect()  # the next shape's layers want this one's memory
        torch.cuda.empty_cache()
        if args.json:
            facts = {
                "device": device,
                "versions": versions(),
                "options": {k: str(v) for k, v in vars(args).items() if k != "json"},
                "threads": torch.get_num_threads(),
                "rows": rows,
            }
            args.json.write_text(json.dumps(facts, indent=1) + "\n")
    print(table(rows, args.precisions[0]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
