"""How much processor time does the Python code of a layer take, ladder's beside megatron-core's?

    python benchmarks/python_overhead.py --json FILE
    python -m tests.te_stand_in.script benchmarks/python_overhead.py --precisions bf16 tensorwise

A GPU waits for Python where a kernel is shorter than the code that launches it. So the layers are very
small here, and the processor time of forward and backward is measured on a CPU. At TP=8 this process is one
rank of eight: collectives return at once and move nothing. The second command measures Transformer Engine's
layers on stand-in kernels, without the time in these kernels. In each repetition every kind has its turn,
and quotients are of two kinds' times in one repetition.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from measuring import facts
from measuring.options import parser_of
from measuring.precisions import PRECISIONS, precision_of
from megatron_ladder.config import ModelConfig, ParallelConfig
from pretrain.bench.decoder import Decoder
from pretrain.bench.interleaved import measure, quotients
from pretrain.bench.ranks import join

HALVES = "standard-halves"
KINDS = ("standard", "parallel", "ladder", "parallel-ladder", HALVES)
LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp8": ParallelConfig(tensor_model_parallel_size=8),
    "tp8-sp": ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True),
}
PASSES = ("forward", "backward")


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["standard", "ladder"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=100, help="interleaved repetitions")
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
        residual="standard" if kind == HALVES else kind,
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
    runs: dict[str, Callable[[], tuple[float, ...]]] = {}
    kinds = [kind for kind in args.kinds if kind != HALVES or layout != "tp1"]
    for kind in kinds:
        model, tokens = model_of(kind, args.layers, layout, fp8.recipe is not None)
        decoder = Decoder(
            model,
            replace(LAYOUTS[layout], tp_overlap="halves" if kind == HALVES else "none"),
            micro_batch_size=2 if HALVES in kinds else 1,
            seq_length=tokens,
            precision=number_format,
            fp8=fp8,
        )
        runs[kind] = partial(timed, decoder)
    times = measure(runs, args.steps)
    first = args.kinds[0]
    rows = []
    for kind, found in times.items():
        row: dict[str, Any] = {"precision": precision, "layout": layout, "kind": kind}
        columns = [*zip(*found, strict=True), [sum(t) for t in found]]
        firsts = [*zip(*times[first], strict=True), [sum(t) for t in times[first]]]
        for name, own, other in zip((*PASSES, "both"), columns, firsts, strict=True):
            row[name] = [1e6 * q / args.layers for q in statistics.quantiles(own, n=4)]
            row[f"{name}_over_{first}"] = quotients(own, other)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], first: str) -> str:
    over = f"both_over_{first}"
    columns = {
        "us a layer: precision": "{precision}",
        "layout": "{layout}",
        "kind": "{kind}",
        **{name: f"{{{name}[1]:.0f}}" for name in (*PASSES, "both")},
        f"over {first}": f"{{{over}[1]:.3f}}",
        "quartiles": f"{{{over}[0]:.3f}} to {{{over}[2]:.3f}}",
    }
    return facts.table(rows, columns)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    rows = []
    for layout in args.layouts:
        device = join(LAYOUTS[layout].tensor_model_parallel_size, fake=True)
        for precision in args.precisions:
            rows += compare(layout, precision, args)
        dist.destroy_process_group()
        facts.write(args.json, {**facts.header(device, args), "rows": rows})
    print(table(rows, args.kinds[0]))


if __name__ == "__main__":
    main()
