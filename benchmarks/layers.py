"""How much longer do ladder layers take than megatron-core's, on one device without tensor parallelism?

    python benchmarks/layers.py --shapes paper-1b llama-3-8b --precisions bf16 tensorwise --json FILE

Measured are forward and backward of a few layers. In each repetition every kind has its turn, and "over
standard" is the quotient of two kinds' times in one repetition. Precisions are measured one after another,
so the speed over the first precision is a quotient of medians.
"""

import argparse
import statistics
from dataclasses import replace
from typing import Any, get_args

from measuring import facts
from measuring.options import parser_of
from measuring.precisions import PRECISIONS, precision_of
from measuring.rows import Rows
from megatron_ladder.config import Attention, ModelConfig, ParallelConfig, Residual
from pretrain.bench.decoder import Decoder
from pretrain.bench.interleaved import measure, quotients
from pretrain.bench.ranks import join
from pretrain.config.presets import PRESETS
from pretrain.run.metrics import flops_per_token, peak_flops

KINDS: tuple[Residual, ...] = ("standard", "parallel", "ladder", "parallel-ladder")


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=PRESETS, default=["paper-1b", "llama-3-8b"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192, help="in micro-batches of a shape")
    parser.add_argument("--steps", type=int, default=30, help="interleaved repetitions")
    parser.add_argument("--attention", choices=get_args(Attention), default="auto")
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
        attention_width=model.attention_width,
        seq_length=seq_length,
        # Of the layers: what a token goes through, without the head.
        matmul_parameters=model.num_matmul_parameters()
        - model.padded_vocab_size * model.hidden_size,
    )


def compare(
    shape: str, precision: str, args: argparse.Namespace, peak: float | None
) -> list[dict[str, Any]]:
    """Every kind of one shape in one precision."""
    model, batch, seq_length = shape_of(shape, args)
    number_format, fp8 = precision_of(precision)
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
    times = measure(
        {kind: decoder.step for kind, decoder in decoders.items()},
        args.steps,
        keep_what_is_there=True,
    )
    load = facts.under_load(decoders["ladder"].step)
    memory = facts.peak_memory()
    rows = []
    for kind, found in times.items():
        own = [sum(t) for t in found]
        low, middle, high = quotients(own, map(sum, times["standard"]))
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
                **memory,  # of all kinds together
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
    columns = {
        "shape": "{shape}",
        "precision": "{precision}",
        "kind": "{kind}",
        "ms": "{ms:.2f}",
        "over standard": "{over_standard:.3f}",
        "quartiles": "{quartiles[0]:.3f} to {quartiles[1]:.3f}",
        "TFLOP/s": "{tflops:.1f}",
        f"speed over {first}": f"{{times_{first}s_speed:.2f}}",
    }
    return facts.table(rows, columns)


def main() -> None:
    args = arguments()
    device = join(1, fake=True)
    peak = None if device == "cpu" else peak_flops(device)
    rows = Rows(device, args)
    for shape in args.shapes:
        for precision in args.precisions:
            with rows.case(shape=shape, precision=precision):
                rows += compare(shape, precision, args, peak)
                add_speeds(rows, args.precisions[0])
    rows.end(table(rows, args.precisions[0]))


if __name__ == "__main__":
    main()
