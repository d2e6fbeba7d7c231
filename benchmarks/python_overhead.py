"""What a layer costs in Python: ladder layers beside megatron-core's, so small that little else counts.

    python benchmarks/python_overhead.py --json FILE
    python -m tests.te_stand_in.script benchmarks/python_overhead.py --precisions bf16 tensorwise

Where kernels are shorter than the Python that launches them, a GPU waits for it. Measured on a CPU as
processor time, forward and backward. At TP=8 this process is one rank of eight: collectives return at once
and move nothing. The second command has Transformer Engine's layers on stand-in kernels, whose time, much
longer than a launch, is left out. Kinds take turns; the quotients are of pairs in one repetition.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from measuring.interleaved import measure
from measuring.precisions import PRECISIONS, precision_of
from megatron_ladder.config import ModelConfig, ParallelConfig
from pretrain.bench.decoder import Decoder
from pretrain.bench.ranks import join
from pretrain.run.versions import versions

KINDS = ("standard", "parallel", "ladder")
LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp8": ParallelConfig(tensor_model_parallel_size=8),
    "tp8-sp": ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True),
}
PASSES = ("forward", "backward")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["standard", "ladder"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=100, help="interleaved repetitions")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def model_of(kind: Any, layers: int, layout: str, in_fp8: bool) -> tuple[ModelConfig, int]:
    """The least that eight ranks share, and its tokens. FP8 takes multiples of 16 on each rank, and
    gathers 8 tokens of each."""
    hidden, tokens = (128, 16) if in_fp8 else (64, 8)
    if in_fp8 and LAYOUTS[layout].sequence_parallel:
        tokens = 64
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=2 * hidden,
        num_attention_heads=8,
        vocab_size=128,
        residual=kind,
    )
    return model, tokens


def now() -> float:
    """Seconds of this process, without those in stand-in kernels where they are installed."""
    stand_ins = sys.modules.get("tests.te_stand_in.kernels")
    return time.process_time() - (stand_ins.seconds if stand_ins else 0.0)


def timed(decoder: Decoder) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass."""
    gc.collect()
    gc.disable()
    begin = now()
    output = decoder.forward()
    middle = now()
    decoder.backward(output)
    end = now()
    gc.enable()
    decoder.clear()
    return middle - begin, end - middle


def compare(layout: str, precision: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every kind at one layout."""
    number_format, fp8 = precision_of(precision)
    if quantization := sys.modules.get("transformer_engine.pytorch.quantization"):
        # It goes on finding scales of layers that are gone.
        quantization.FP8GlobalStateManager.reset()
    runs = {}
    for kind in args.kinds:
        model, tokens = model_of(kind, args.layers, layout, fp8.recipe is not None)
        decoder = Decoder(
            model,
            LAYOUTS[layout],
            micro_batch_size=1,
            seq_length=tokens,
            precision=number_format,
            fp8=fp8,
        )
        runs[kind] = lambda decoder=decoder: timed(decoder)
    times = measure(runs, args.steps)
    first = args.kinds[0]
    rows = []
    for kind, found in times.items():
        row: dict[str, Any] = {"precision": precision, "layout": layout, "kind": kind}
        columns = [*zip(*found, strict=True), [sum(t) for t in found]]
        firsts = [*zip(*times[first], strict=True), [sum(t) for t in times[first]]]
        for name, own, other in zip((*PASSES, "both"), columns, firsts, strict=True):
            row[name] = [1e6 * q / args.layers for q in statistics.quantiles(own, n=4)]
            quotients = [a / b for a, b in zip(own, other, strict=True)]
            row[f"{name}_over_{first}"] = statistics.quantiles(quotients, n=4)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], first: str) -> str:
    lines = [
        f"| us a layer: precision | layout | kind | forward | backward | both | over {first} | quartiles |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        forward, backward, both = (row[name][1] for name in (*PASSES, "both"))
        low, middle, high = row[f"both_over_{first}"]
        lines.append(
            f"| {row['precision']} | {row['layout']} | {row['kind']} | {forward:.0f} | {backward:.0f} | "
            f"{both:.0f} | {middle:.3f} | {low:.3f} to {high:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    rows = []
    for layout in args.layouts:
        device = join(LAYOUTS[layout].tensor_model_parallel_size, fake=True)
        for precision in args.precisions:
            rows += compare(layout, precision, args)
        dist.destroy_process_group()
        if args.json:
            facts = {
                "device": device,
                "versions": versions(),
                "options": {k: str(v) for k, v in vars(args).items() if k != "json"},
                "rows": rows,
            }
            args.json.write_text(json.dumps(facts, indent=1) + "\n")
    print(table(rows, args.kinds[0]))


if __name__ == "__main__":
    main()
