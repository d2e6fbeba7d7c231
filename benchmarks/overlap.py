"""How much of the tensor-parallel link's time does each kind of layers hide, forward and backward?

    python benchmarks/overlap.py --json benchmarks/results/overlap.json

Kinds are megatron-core's standard layers and this project's: standard and parallel ones, also in two halves
of the micro-batch, ladder, a hybrid, parallel-ladder, and no-comm, which never communicates.

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
(T_standard - T_kind) / (T_standard - T_no-comm), and the largest share that each kind can hide: by its
number of layers alone, and by the planner's model of a pass with the times measured here. What a kind
costs when the link takes no time (halves have smaller GEMMs) is its time without the link over standard's.

With --processor-time computation counts by the processor time of the thread that computes, and a wait for
the link is added, not slept (measuring/overlap/clock.py): for a CPU that other programs use too.

With --fake-tp N one process plays rank 0 of N, and collectives move nothing: for one GPU. If the layers do
not fit in its memory, half as many are measured, and the results say so.
"""

import argparse
import contextlib
import gc
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import measuring  # noqa: F401  # isort: skip (before megatron-core: which cuDNN is loaded)
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from measuring import facts, ranks
from measuring.options import parser_of
from measuring.overlap.clock import restart, use_processor_time
from measuring.overlap.hidden import (
    BLOCKING,
    PASSES,
    Shares,
    hidden_share,
    in_words,
    link_time,
    most_by_layers,
    most_by_planner,
    over_standard,
    planned,
    scaled,
    table,
    target_ratio,
    weight_gradient_shares,
)
from measuring.overlap.kinds import ALSO, chosen
from measuring.overlap.late import started_late
from measuring.precisions import PRECISIONS, precision_of
from megatron_ladder.collectives import backward_order, ranges
from megatron_ladder.config import ModelConfig, ParallelConfig
from pretrain.bench.decoder import Decoder
from pretrain.bench.interleaved import measure, slowest
from pretrain.bench.kinds_plan import KINDS, NO_COMM
from pretrain.bench.ranks import join
from pretrain.bench.recorder import Recorder
from pretrain.bench.wire import over, own_seconds
from pretrain.config.presets import PRESETS as TRAIN_PRESETS
from pretrain.loop.profile import traced
from pretrain.plan.links import PRESETS as LINKS
from pretrain.plan.planner import Submodule

AUTOGRAD = "autograd-order"
AllReduce = Callable[[float], float]
"""Bytes of the whole message -> seconds that an all-reduce is under way."""


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

    def step(self, link: AllReduce) -> tuple[float, float]:
        """Seconds of forward and of backward; a collective is at least as long under way as `link` says."""

        def seconds(operation: str, size: int) -> float:
            return link(size) * (1.0 if operation == "all-reduce" else 0.5)

        backward_order.enabled = self.mended
        group = parallel_state.get_tensor_model_parallel_group()
        before = facts.device_allocations()
        restart()
        late = contextlib.nullcontext() if self.early else started_late()
        with late, over(group, seconds, blocking=self.blocking):
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
        "--processor-time",
        action="store_true",
        help="count processor time, on a CPU that other programs use too",
    )
    parser.add_argument(
        "--also",
        nargs="*",
        choices=[*ALSO, AUTOGRAD],
        default=[*ALSO, AUTOGRAD],
        help="beside standard and ladder; default all. Halves need an even micro-batch",
    )
    parser.add_argument(
        "--trace", type=Path, help="of a pass of standard and of ladder, for Perfetto"
    )
    return parser.parse_args()


def decoder_of(args: argparse.Namespace, tp: int, name: str) -> Decoder:
    kind = KINDS[name]
    number_format, fp8 = precision_of(args.precision)
    model = ModelConfig(
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.heads,
        num_query_groups=args.kv_heads,
        vocab_size=128 * tp,
        **kind.model_fields(args.layers),
    )
    return Decoder(
        model,
        ParallelConfig(
            tensor_model_parallel_size=tp,
            sequence_parallel=args.sequence_parallel and name != NO_COMM,
            tp_overlap=kind.tp_overlap,
        ),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        recompute=args.recompute,
        precision=number_format,
        fp8=fp8,
    )


def lines(args: argparse.Namespace, tp: int, no_comm: Line) -> tuple[list[Line], dict[str, str]]:
    """Standard, ladder, what is asked for besides, and why some of that was left out."""
    names, left_out = chosen(args.also, args.micro_batch_size)
    result = [
        no_comm if name == NO_COMM else Line(name, decoder_of(args, tp, name)) for name in names
    ]
    by_name = {line.name: line.decoder for line in result}
    result.insert(0, Line(BLOCKING, by_name["standard"], blocking=True))
    if AUTOGRAD in args.also and not args.sequence_parallel:
        result += [
            Line("ladder, autograd's order", by_name["ladder"], mended=False),
            Line("  and started late", by_name["ladder"], mended=False, early=False),
        ]
    return result, left_out


def submodules(
    decoder: Decoder, args: argparse.Namespace, tp: int, device: str
) -> tuple[Submodule, Submodule]:
    """Medians of attention's and MLP's compute, for the planner's model of a pass. How much of backward is
    the first linear's weight gradient is the planner's."""
    recorder = Recorder(decoder, dist.get_rank())
    spans = [span for _ in range(3) for span in recorder.step()]
    recorder.close()

    def of(kind: str, weight_gradient: float) -> Submodule:
        def median(direction: str) -> float:
            return statistics.median(
                s.end_s - s.start_s
                for s in spans
                if s.kind == "compute" and s.name.startswith(kind) and s.direction == direction
            )

        return Submodule(
            median("forward"), median("backward"), median("backward") * weight_gradient
        )

    attention, mlp = weight_gradient_shares(
        decoder.model,
        tokens=args.seq_length * args.micro_batch_size,
        seq_length=args.seq_length,
        tp=tp,
        fp8=precision_of(args.precision)[1].recipe is not None,
        on_gpu=device != "cpu",
    )
    return of("attention", attention), of("mlp", mlp)


def link_of(
    args: argparse.Namespace, tp: int, submodule_s: float, state_bytes: int
) -> tuple[AllReduce, float]:
    """The link, and an all-reduce of the states over a sub-module's forward."""
    if args.link and not args.target:
        link = LINKS[args.link].for_ranks(tp).all_reduce_seconds
        return link, link(state_bytes) / submodule_s
    ratio = target_ratio(args.target, args.link) if args.link and args.target else args.link_ratio
    return lambda nbytes: ratio * submodule_s * nbytes / state_bytes, ratio


def nothing(_: float) -> float:
    """Of a link that takes no time."""
    return 0.0


def bounds_of(
    args: argparse.Namespace, names: list[str], parts: tuple[Submodule, Submodule], link_s: float
) -> dict[str, dict[str, Shares]]:
    """Of each kind the most that it can hide, by how it was found. Nothing where standard layers
    communicate more, in recomputation."""
    bounds: dict[str, dict[str, Shares]] = {}
    for name in names if args.recompute == "none" else []:
        kind, sp = KINDS[name], args.sequence_parallel
        by_planner = most_by_planner(kind, args.layers, sp, parts, link_s)
        by_layers = most_by_layers(kind, args.layers, sp) if kind.hides else None
        found = {"layers": by_layers, "planner": by_planner}
        bounds[name] = {by: shares for by, shares in found.items() if shares}
    return bounds


def measured(args: argparse.Namespace, tp: int, device: str) -> dict[str, Any]:
    """Measures, prints, and returns what is to be written."""
    facts.forget_peak()
    no_comm = Line(NO_COMM, decoder_of(args, tp, NO_COMM))
    passes = [slowest(no_comm.step(nothing)) for _ in range(6)][1:]
    forward_s, backward_s = (statistics.median(t[i] for t in passes) for i in (0, 1))
    submodule_s = forward_s / (2 * args.layers)
    state_bytes = no_comm.decoder.state_bytes
    link, ratio = link_of(args, tp, submodule_s, state_bytes)
    link_s, own_s = link(state_bytes), 0.0
    if device == "cpu" and args.fake_tp is None:
        message = torch.empty(args.seq_length, args.micro_batch_size, args.hidden_size)
        own_s = own_seconds(parallel_state.get_tensor_model_parallel_group(), message)
    parts = submodules(no_comm.decoder, args, tp, device)
    if device != "cpu":
        parts = scaled(parts, args.layers, forward_s, backward_s)

    found, left_out = lines(args, tp, no_comm)
    del no_comm  # if it is not measured, the others want its memory

    def under_way(nbytes: float) -> float:
        return link(nbytes) + own_s * nbytes / state_bytes

    runs: dict[tuple[str, str], Callable[[], tuple[float, ...]]] = {
        (line.name, way): lambda line=line, seconds=seconds: line.step(seconds)  # type: ignore[misc]
        for line in found
        for way, seconds in (("link", under_way), ("zero", nothing))
        if not (line.name == NO_COMM and way == "zero")  # it has no collectives
    }
    for line in found:
        line.device_allocations.clear()
    times = measure(runs, args.steps, keep_what_is_there=args.fake_tp is not None)
    ladder = next(line for line in found if line.name == "ladder")
    load = facts.under_load(runs["ladder", "link"]) if args.fake_tp else {}
    names = [line.name for line in found if line.name in KINDS and line.name != NO_COMM]
    bounds = bounds_of(args, names, parts, link_s)
    zero = in_words(over_standard(times, "ladder", "zero"))
    report: dict[str, Any] = {
        "measured": f"{tp} ranks, {device}, {platform.processor() or platform.machine()}",
        **facts.header(device, args),
        "attention": facts.attention_of(ladder.decoder.block),
        **facts.peak_memory(),
        **load,
        "layers": args.layers,
        "link_s": link_s,
        "own_s": own_s,
        "link_ratio": ratio,
        "left_out": left_out,
        "planned_link_ms": {},
        "submodule_forward_s": submodule_s,
        "attention_mlp_s": [asdict(part) for part in parts],
        "times_s": [{"kind": k, "link": w, "forward_backward": t} for (k, w), t in times.items()],
        "device_allocations": {line.name: line.device_allocations for line in found},
        "hidden_share": {
            against: {
                line.name: {p: hidden_share(times, line.name, p, against) for p in PASSES}
                for line in found
                if line.name not in (against, NO_COMM)
            }
            for against in (BLOCKING, "standard")
        },
        "most_hidden": bounds,
        "ladder_over_standard_zero_delay": zero,
    }
    if dist.get_rank() == 0:
        print(table(times, bounds))
        print("".join(f"\nLeft out, {name}: {why}" for name, why in left_out.items()))
        print(
            f"An all-reduce is {1e3 * link_s:.2f} ms on the link (modelled), on top of its own work."
        )
        print(facts.in_words(report))
        print("\nms that the link adds, measured and by the planner's model of a pass")
    options = {"sequence_parallel": args.sequence_parallel, "recompute": args.recompute}
    for name in names:
        by_planner = planned(KINDS[name], args.layers, parts, own_s, link_s, options)
        passes_s = zip(("forward", "backward"), by_planner, strict=True)
        cells = [(1e3 * link_time(times, name, p), 1e3 * s) for p, s in passes_s]
        report["planned_link_ms"][name] = {"measured_planned": cells}
        if dist.get_rank() == 0:
            print(f"{name:30}" + "".join(f"{m:10.1f} {s:7.1f}" for m, s in cells))
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
    if args.processor_time:
        use_processor_time()
    report = as_many_as_fit(args, tp, device)
    if args.fake_tp is None:
        join(1)
        alone = {name: Line(name, decoder_of(args, 1, name)) for name in ("standard", "ladder")}
        single = measure(
            {(n, "zero"): lambda line=line: line.step(nothing) for n, line in alone.items()},  # type: ignore[misc]
            args.steps,
        )
        report["ladder_over_standard_tp1"] = in_words(over_standard(single, "ladder", "zero"))
        if dist.get_rank() == 0:
            print(f"Ladder / standard step time, TP=1: {report['ladder_over_standard_tp1']}")
    if dist.get_rank() == 0:
        facts.write(args.json, report)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
