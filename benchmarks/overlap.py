"""How much of the tensor-parallel link's time does each residual kind hide, forward and backward?

    python benchmarks/overlap.py --json benchmarks/results/overlap.json

Measured: all computation, and the collectives' own work, on real ranks (gloo on a CPU).
Modelled: how long a collective is on the link (pretrain/bench/wire.py), the same for every kind.
--link-ratio gives that time as a multiple of a sub-module's forward compute. With --link it is the time
that this link takes for the message, for a GPU and real shapes. With --link and --target it is the
multiple that it would be for that model's layers on H100s.

A kind's hidden share of the link's time is
    1 - (T_kind(link) - T_kind(zero)) / (T_standard(link) - T_standard(zero))
because on a CPU the collectives' own work takes compute time and cannot be hidden. There are two standards:
one waits for every collective at once, so it hides nothing; the other is megatron-core's own layer, which
in backward hides a reduction behind its own weight gradient. Also given are
(T_standard - T_kind) / (T_standard - T_no-comm), and the largest share that ladder can hide: by its number
of layers alone, and by the planner's model of a pass with the times measured here.

With --fake-tp N one process plays rank 0 of N, and collectives move nothing: for one GPU. If the layers do
not fit in its memory, half as many are measured, and the results say so.
"""

import argparse
import gc
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from measuring import facts, ranks
from measuring.hidden import (
    BLOCKING,
    NO_COMM,
    PASSES,
    hidden_share,
    link_time,
    most_hidden,
    paired,
    planned,
    scaled,
    table,
)
from measuring.options import parser_of
from measuring.precisions import PRECISIONS, precision_of
from megatron_ladder.collectives import backward_order, ranges
from megatron_ladder.collectives.points import collectives_of
from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.layers import linear
from pretrain.bench.decoder import Decoder
from pretrain.bench.interleaved import measure, slowest
from pretrain.bench.ranks import join
from pretrain.bench.recorder import Recorder
from pretrain.bench.wire import over, own_seconds
from pretrain.config.presets import PRESETS as TRAIN_PRESETS
from pretrain.loop.profile import traced
from pretrain.plan.links import NVLINK
from pretrain.plan.links import PRESETS as LINKS
from pretrain.plan.planner import DEVICES, Hardware, Submodule
from pretrain.plan.planner import submodules as planned_submodules

ALSO = {"parallel": "parallel", "hybrid": "hybrid (last half)", NO_COMM: NO_COMM}
AUTOGRAD = "autograd-order"


@dataclass
class Line:
    """One row of the table: a decoder and how it is run."""

    name: str
    decoder: Decoder
    blocking: bool = False
    """Every collective is waited for where it starts."""
    mended: bool = True
    """Backward runs in the order of megatron_ladder/collectives/backward_order.py, not in autograd's."""
    early: bool = True
    """The input gradient's reduction starts before the weight gradient is computed."""
    device_allocations: list[int] = field(default_factory=list)
    """How often each step, the warm-up too, asked CUDA for memory. No step should need to."""

    def step(self, under_way_s: float) -> tuple[float, float]:
        """Seconds of forward and of backward; an all-reduce is at least that long under way."""

        def seconds(operation: str, size: int) -> float:
            if operation == "all-reduce":
                return under_way_s
            return (
                under_way_s / 2 * size / self.decoder.state_bytes
            )  # in FP8 half of it is gathered

        backward_order.enabled = self.mended
        te = [
            sys.modules.get(f"megatron_ladder.te.layers.{name}")
            for name in ("backend", "fp8_linear")
        ]
        for module in (linear, *te):
            if module is not None:
                module.collectives_of = collectives_of if self.early else lambda _: None  # type: ignore[attr-defined]
        group = parallel_state.get_tensor_model_parallel_group()
        before = facts.device_allocations()
        with over(group, seconds, blocking=self.blocking):
            times = self.decoder.step()
        self.device_allocations.append(facts.device_allocations() - before)
        return times


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--ffn-hidden-size", type=int, default=1536)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="None: as many as heads")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="or an FP8 recipe")
    parser.add_argument("--steps", type=int, default=15, help="interleaved repetitions")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--link-ratio", type=float, default=0.5, help="of a sub-module's forward")
    parser.add_argument("--link", choices=LINKS, help="its time for these messages, no ratio")
    parser.add_argument(
        "--target",
        choices=TRAIN_PRESETS,
        help="with --link: the ratio of its layers at TP=8 on H100s",
    )
    ranks.add_fake_tp(parser)
    parser.add_argument(
        "--also",
        nargs="*",
        choices=[*ALSO, AUTOGRAD],
        default=[*ALSO, AUTOGRAD],
        help="beside standard and ladder; default all",
    )
    parser.add_argument(
        "--trace", type=Path, help="of a pass of standard and of ladder, for Perfetto"
    )
    return parser.parse_args()


def target_ratio(target: str, link: str) -> float:
    """An all-reduce over a sub-module's forward, for a preset's layers at TP=8 on H100s, by the
    planner's model of their compute."""
    config = TRAIN_PRESETS[target]()
    tokens = config.micro_batch_size * config.data.seq_length
    hardware = Hardware(DEVICES["h100"], NVLINK)
    attention, mlp = planned_submodules(
        config.model, hardware, tokens=tokens, seq_length=config.data.seq_length, tp=8, sp=False
    )
    message = 2 * tokens * config.model.hidden_size  # bf16
    seconds = LINKS[link].all_reduce_seconds(message)
    return seconds / ((attention.forward_s + mlp.forward_s) / 2)


def decoder_of(args: argparse.Namespace, tp: int, name: str) -> Decoder:
    kinds: dict[str, dict[str, Any]] = {
        "hybrid (last half)": {"residual": "ladder", "ladder_layers": args.layers // 2},
    }
    number_format, fp8 = precision_of(args.precision)
    model = ModelConfig(
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.heads,
        num_query_groups=args.kv_heads,
        vocab_size=128 * tp,
        **kinds.get(name, {"residual": name}),
    )
    return Decoder(
        model,
        ParallelConfig(
            tensor_model_parallel_size=tp,
            sequence_parallel=args.sequence_parallel and name != NO_COMM,
        ),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        recompute=args.recompute,
        precision=number_format,
        fp8=fp8,
    )


def lines(args: argparse.Namespace, tp: int) -> list[Line]:
    """Standard, ladder, and what is asked for besides."""
    order = ["standard", "parallel", "ladder", "hybrid"]
    names = [ALSO.get(n, n) for n in order if n in ("standard", "ladder", *args.also)]
    result = [Line(name, decoder_of(args, tp, name)) for name in names]
    by_name = {line.name: line.decoder for line in result}
    result.insert(0, Line(BLOCKING, by_name["standard"], blocking=True))
    if AUTOGRAD in args.also and not args.sequence_parallel:
        result += [
            Line("ladder, autograd's order", by_name["ladder"], mended=False),
            Line("  and started late", by_name["ladder"], mended=False, early=False),
        ]
    return result


def submodules(decoder: Decoder, args: argparse.Namespace) -> tuple[Submodule, Submodule]:
    """Medians of attention's and MLP's compute, for the planner's model of a pass."""
    recorder = Recorder(decoder, dist.get_rank())
    spans = [span for _ in range(3) for span in recorder.step()]
    recorder.close()

    def of(kind: str, first_linear: float) -> Submodule:
        def median(direction: str) -> float:
            return statistics.median(
                s.end_s - s.start_s
                for s in spans
                if s.kind == "compute" and s.name.startswith(kind) and s.direction == direction
            )

        # Half of the first linear's backward is its weight's gradient.
        return Submodule(
            median("forward"), median("backward"), median("backward") * first_linear / 2
        )

    # Of a sub-module's GEMMs: q, k, v of 4 h^2; gate and up of 3 h ffn.
    return of("attention", 3 / 4), of("mlp", 2 / 3)


def link_of(args: argparse.Namespace, tp: int, submodule_s: float) -> tuple[float, float]:
    """Seconds of an all-reduce on the link, and that over a sub-module's forward."""
    if args.link and not args.target:
        element_bytes = 4 if args.precision == "fp32" else 2
        size = args.seq_length * args.micro_batch_size * args.hidden_size * element_bytes
        link_s = LINKS[args.link].for_ranks(tp).all_reduce_seconds(size)
        return link_s, link_s / submodule_s
    ratio = target_ratio(args.target, args.link) if args.link and args.target else args.link_ratio
    return ratio * submodule_s, ratio


def measured(args: argparse.Namespace, tp: int, device: str) -> dict[str, Any]:
    """Measures, prints, and returns what is to be written."""
    facts.forget_peak()
    no_comm = Line(NO_COMM, decoder_of(args, tp, NO_COMM))
    passes = [slowest(no_comm.step(0.0)) for _ in range(6)][1:]
    forward_s, backward_s = (statistics.median(t[i] for t in passes) for i in (0, 1))
    submodule_s = forward_s / (2 * args.layers)
    link_s, ratio = link_of(args, tp, submodule_s)
    own_s = 0.0
    if device == "cpu" and args.fake_tp is None:
        message = torch.empty(args.seq_length, args.micro_batch_size, args.hidden_size)
        own_s = own_seconds(parallel_state.get_tensor_model_parallel_group(), message)
    parts = submodules(no_comm.decoder, args)
    if device != "cpu":
        parts = scaled(parts, args.layers, forward_s, backward_s)

    chosen = lines(args, tp)
    if NO_COMM in args.also:
        chosen.append(no_comm)
    del no_comm  # the others want its memory
    runs: dict[tuple[str, str], Callable[[], tuple[float, ...]]] = {
        (line.name, way): lambda line=line, s=s: line.step(s)  # type: ignore[misc]
        for line in chosen
        for way, s in (("link", own_s + link_s), ("zero", 0.0))
        if not (line.name == NO_COMM and way == "zero")  # it has no collectives
    }
    for line in chosen:
        line.device_allocations.clear()
    times = measure(runs, args.steps)
    ladder = next(line for line in chosen if line.name == "ladder")
    load = facts.under_load(runs["ladder", "link"]) if args.fake_tp else {}
    bounds = {}
    if args.recompute == "none":  # else standard layers communicate more
        bounds = {
            "layers": most_hidden(args.layers, args.sequence_parallel),
            "planner": most_hidden(args.layers, args.sequence_parallel, parts, link_s),
        }
    zero = paired(times["ladder", "zero"], times["standard", "zero"])
    report: dict[str, Any] = {
        "measured": f"{tp} ranks, {device}, {platform.processor() or platform.machine()}",
        "modelled": f"an all-reduce is {link_s:.6f} s on the link, {ratio} x a sub-module's forward, "
        f"on top of its own {own_s:.6f} s",
        **facts.header(device, args),
        "attention": facts.attention_of(ladder.decoder.block),
        **facts.peak_memory(),
        **load,
        "layers": args.layers,
        "link_s": link_s,
        "own_s": own_s,
        "planned_link_ms": {},
        "submodule_forward_s": submodule_s,
        "times_s": [{"kind": k, "link": w, "forward_backward": t} for (k, w), t in times.items()],
        "device_allocations": {line.name: line.device_allocations for line in chosen},
        "hidden_share": {
            against: {
                line.name: {p: hidden_share(times, line.name, p, against) for p in PASSES}
                for line in chosen
                if line.name not in (against, NO_COMM)
            }
            for against in (BLOCKING, "standard")
        },
        "most_hidden": bounds,
        "ladder_over_standard_zero_delay": zero,
    }
    if dist.get_rank() == 0:
        print(table(times, bounds))
        print(
            f"\nAn all-reduce is {1e3 * link_s:.2f} ms on the link (modelled), on top of its own work."
        )
        print(f"Ladder / standard step time, zero delay, TP={tp}: {zero}")
        print(facts.in_words(report))
        print("\nms that the link adds, measured and by the planner's model of a pass")
    options = {"sequence_parallel": args.sequence_parallel, "recompute": args.recompute}
    for line in chosen:
        if line.name not in ("standard", "ladder", *ALSO.values()) or line.name == NO_COMM:
            continue
        cells = [
            (1e3 * link_time(times, line.name, p), 1e3 * s)
            for p, s in zip(
                ("forward", "backward"),
                planned(line.name, args.layers, parts, own_s, link_s, options),
                strict=True,
            )
        ]
        report["planned_link_ms"][line.name] = {"measured_planned": cells}
        if dist.get_rank() == 0:
            print(f"{line.name:30}" + "".join(f"{m:10.1f} {s:7.1f}" for m, s in cells))
    if dist.get_rank() == 0:
        facts.write(args.json, report)
    if args.trace:
        with traced(args.trace):
            for name in ("standard", "ladder"):
                with ranges.named(name):
                    runs[name, "link"]()
    return report


def as_many_as_fit(args: argparse.Namespace, tp: int, device: str) -> dict[str, Any]:
    """With half as many layers after each failure. One process can do that; several would have to agree."""
    refused: list[str] = []
    while True:
        try:
            report = measured(args, tp, device)
        except torch.OutOfMemoryError as error:
            if args.fake_tp is None or args.layers < 2:
                raise
            refused.append(f"{args.layers} layers: {facts.reason(error)}")
            print(refused[-1], flush=True)
        else:
            return {**report, "did_not_fit": refused} if refused else report
        args.layers //= 2
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    args = arguments()
    tp, device = ranks.start(args)
    report = as_many_as_fit(args, tp, device)
    if args.fake_tp is None:
        join(1)
        alone = {name: Line(name, decoder_of(args, 1, name)) for name in ("standard", "ladder")}
        single = measure(
            {name: lambda line=line: line.step(0.0) for name, line in alone.items()},  # type: ignore[misc]
            args.steps,
        )
        report["ladder_over_standard_tp1"] = paired(single["ladder"], single["standard"])
        if dist.get_rank() == 0:
            print(f"Ladder / standard step time, TP=1: {report['ladder_over_standard_tp1']}")
    if dist.get_rank() == 0:
        facts.write(args.json, report)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
