"""Ladder layers beside megatron-core's on one device, without tensor parallelism: what the ladder costs.

    python benchmarks/layers.py --shapes paper-1b llama-3-8b --precisions bf16 tensorwise --json FILE

Measured: forward and backward of a few layers, every kind in turn, repetition by repetition. "Over
standard" is of pairs in one repetition; a precision's speed over the first's is of medians, as one
precision is built at a time.
"""

import argparse
import gc
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist

from measuring import facts
from measuring.interleaved import measure
from measuring.precisions import PRECISIONS, precision_of
from megatron_ladder.config import Attention, ModelConfig, ParallelConfig
from pretrain.bench.decoder import Decoder
from pretrain.bench.ranks import join
from pretrain.config.presets import PRESETS
from pretrain.run.metrics import flops_per_token, peak_flops

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
    parser.add_argument("--attention", choices=get_args(Attention), default="auto")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def shape_of(name: str, args: argparse.Namespace) -> tuple[ModelConfig, int, int]:
    """A preset's layers, its sequences in a micro-batch, and their length."""
    config = PRESETS[name]()
    model = replace(config.model, num_layers=args.layers, vocab_size=128, ladder_layers=None)
    seq_length = min(config.data.seq_length, args.tokens)
    return model, args.tokens // seq_length, seq_length


def flops(model: ModelConfig, tokens: int, seq_length: int) -> float:
    """Of a forward and a backward pass."""
    return tokens * flops_per_token(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        seq_length=seq_length,
        matmul_parameters=model.num_parameters(embeddings=False) - model.hidden_size,
    )


def compare(
    shape: str, precision: str, args: argparse.Namespace, peak: float | None
) -> list[dict[str, Any]]:
    """Every kind of one shape in one precision."""
    model, batch, seq_length = shape_of(shape, args)
    number_format, fp8 = precision_of(precision)
    facts.forget_peak()
    decoders = {
        kind: Decoder(
            replace(model, residual=kind),
            ParallelConfig(),
            micro_batch_size=batch,
            seq_length=seq_length,
            precision=number_format,
            fp8=fp8,
            attention=args.attention,
        )
        for kind in KINDS
    }
    times = measure({kind: decoder.step for kind, decoder in decoders.items()}, args.steps)
    load = facts.under_load(decoders["ladder"].step)
    memory = facts.peak_memory()
    rows = []
    for kind, found in times.items():
        own = [sum(t) for t in found]
        standard = [sum(t) for t in times["standard"]]
        over_standard = [a / b for a, b in zip(own, standard, strict=True)]
        low, middle, high = statistics.quantiles(over_standard, n=4)
        seconds = statistics.median(own)
        done = flops(model, batch * seq_length, seq_length)
        rows.append(
            {
                "shape": shape,
                "precision": precision,
                "kind": kind,
                "layers": args.layers,
                "tokens": batch * seq_length,
                "ms": 1e3 * seconds,
                "forward_ms": 1e3 * statistics.median(t[0] for t in found),
                "over_standard": middle,
                "quartiles": [low, high],
                "tflops": done / seconds / 1e12,
                "share_of_bf16_peak": done / seconds / peak if peak else None,
                "attention": facts.attention_of(decoders[kind].block),
                **memory,  # of the three kinds together
                **load,
            }
        )
    return rows


def add_speeds(rows: list[dict[str, Any]], first: str) -> None:
    """Over the first precision of the same shape and kind, where that was measured."""
    firsts = {
        (r["shape"], r["kind"]): r["ms"] for r in rows if r["precision"] == first and "ms" in r
    }
    for row in rows:
        of_first = firsts.get((row["shape"], row.get("kind")))
        if of_first and "ms" in row:
            row[f"times_{first}s_speed"] = of_first / row["ms"]


def table(rows: list[dict[str, Any]], first: str) -> str:
    titles = ["shape", "precision", "kind", "ms", "over standard", "quartiles", "TFLOP/s"]
    lines = []
    for row in rows:
        cells = [row["shape"], row["precision"], row.get("kind", "all")]
        if "error" in row:
            lines.append([*cells, row["error"]])
            continue
        low, high = row["quartiles"]
        speed = row.get(f"times_{first}s_speed")
        cells += [f"{row['ms']:.2f}", f"{row['over_standard']:.3f}", f"{low:.3f} to {high:.3f}"]
        lines.append([*cells, f"{row['tflops']:.1f}", f"{speed:.2f}" if speed else ""])
    return facts.markdown([*titles, f"speed over {first}"], lines)


def main() -> None:
    args = arguments()
    device = join(1, fake=True)
    peak = None if device == "cpu" else peak_flops(device)
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        for precision in args.precisions:
            try:
                rows += compare(shape, precision, args, peak)
            except RuntimeError as error:  # the others can still be measured
                row = {"shape": shape, "precision": precision, "error": facts.reason(error)}
                rows.append(row)
            print(f"{shape}, {precision}: {facts.in_words(rows[-1])}", flush=True)
            add_speeds(rows, args.precisions[0])
            facts.write(args.json, {**facts.header(device, args), "rows": rows})
            gc.collect()  # the next ones want the memory
            torch.cuda.empty_cache()
    print(table(rows, args.precisions[0]))
    dist.destroy_process_group()
    sys.exit(facts.failed(rows))


if __name__ == "__main__":
    main()
