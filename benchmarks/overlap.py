"""How much of the tensor-parallel link's time each residual kind hides, forward and backward.

    python benchmarks/overlap.py --json benchmarks/results/overlap.json

Measured: everything that is computed, and the collectives' own work, on real ranks (gloo on a CPU).
Modelled: how long a collective is on the link (pretrain/bench/wire.py), the same for every kind. Its
time is `--link-ratio` times the forward compute of a sub-module; or, with --link, that link's for the
message, for a GPU and real shapes; or, with --link and --target, the ratio is what it would be for
that model's layers on H100s.

A kind's hidden share of the link's time is
    1 - (T_kind(link) - T_kind(zero)) / (T_standard(link) - T_standard(zero))
as collectives' own work on a CPU takes compute time and cannot hide. It is given against two
standards: one that waits for every collective at once, which is all the link's time; and
megatron-core's own layer, which in backward hides a reduction behind its own weight gradient.
Also given is the usual (T_standard - T_kind) / (T_standard - T_no-comm).

With --fake-tp N one process plays rank 0 of N, and collectives move nothing: for one GPU.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ladder import backward_order, linear, ranges
from megatron_ladder.collectives import collectives_of
from megatron_ladder.config import ModelConfig, ParallelConfig
from pretrain.bench.decoder import Decoder
from pretrain.bench.interleaved import measure, slowest
from pretrain.bench.links import NVLINK
from pretrain.bench.links import PRESETS as LINKS
from pretrain.bench.plan import DEVICES, Hardware, Submodule, pass_seconds
from pretrain.bench.plan import submodules as planned_submodules
from pretrain.bench.precisions import PRECISIONS, precision_of
from pretrain.bench.ranks import become_torchrun, join
from pretrain.bench.recorder import Recorder
from pretrain.bench.wire import over, own_seconds
from pretrain.presets import PRESETS as TRAIN_PRESETS
from pretrain.profile import traced
from pretrain.run_log import versions

TP = 2
BLOCKING = "standard, waiting at once"


@dataclass
class Line:
    """One row of the table: a decoder and how it is run."""

    name: str
    decoder: Decoder
    blocking: bool = False
    """Every collective is waited for where it starts."""
    mended: bool = True
    """Backward's order is changed (backward_order.py)."""
    early: bool = True
    """The input gradient's reduction starts before the weight gradient is computed."""

    def step(self, under_way_s: float) -> tuple[float, float]:
        """Seconds of forward and of backward; an all-reduce is at least that long under way."""

        def seconds(operation: str, size: int) -> float:
            if operation == "all-reduce":
                return under_way_s
            return (
                under_way_s / 2 * size / self.decoder.state_bytes
            )  # in FP8 half of it is gathered

        backward_order.enabled = self.mended
        te = [sys.modules.get(f"megatron_ladder.te.{name}") for name in ("backend", "fp8_linear")]
        for module in (linear, *te):
            if module is not None:
                module.collectives_of = collectives_of if self.early else lambda _: None  # type: ignore[attr-defined]
        group = parallel_state.get_tensor_model_parallel_group()
        with over(group, seconds, blocking=self.blocking):
            return self.decoder.step()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    parser.add_argument("--fake-tp", type=int, help="one process as rank 0 of this many")
    parser.add_argument("--json", type=Path, help="write every time measured")
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


def lines(args: argparse.Namespace, tp: int, names: tuple[str, ...]) -> list[Line]:
    kinds: dict[str, dict[str, Any]] = {
        "standard": {"residual": "standard"},
        "parallel": {"residual": "parallel"},
        "ladder": {"residual": "ladder"},
        "hybrid (last half)": {"residual": "ladder", "ladder_layers": args.layers // 2},
        "no-comm": {"residual": "no-comm"},
    }
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, sequence_parallel=args.sequence_parallel
    )

    number_format, fp8 = precision_of(args.precision)

    def decoder(kind: dict[str, Any]) -> Decoder:
        model = ModelConfig(
            num_layers=args.layers,
            hidden_size=args.hidden_size,
            ffn_hidden_size=args.ffn_hidden_size,
            num_attention_heads=args.heads,
            num_query_groups=args.kv_heads,
            vocab_size=128 * tp,
            **kind,
        )
        layout = (
            ParallelConfig(tensor_model_parallel_size=tp)
            if kind["residual"] == "no-comm"
            else parallel
        )
        return Decoder(
            model,
            layout,
            micro_batch_size=args.micro_batch_size,
            seq_length=args.seq_length,
            recompute=args.recompute,
            precision=number_format,
            fp8=fp8,
        )

    result = [Line(name, decoder(kinds[name])) for name in names]
    if tp > 1:
        by_name = {line.name: line.decoder for line in result}
        result.insert(0, Line(BLOCKING, by_name["standard"], blocking=True))
        if not args.sequence_parallel:
            result += [
                Line("ladder, autograd's order", by_name["ladder"], mended=False),
                Line("  and started late", by_name["ladder"], mended=False, early=False),
            ]
    return result


Times = dict[tuple[str, str], list[tuple[float, ...]]]
"""By line and link: seconds of forward and of backward, of each repetition."""

PASSES: dict[str, Callable[[tuple[float, ...]], float]] = {
    "forward": lambda t: t[0],
    "backward": lambda t: t[1],
    "total": sum,
}


def median(times: Times, key: tuple[str, str], part: str) -> float:
    return statistics.median(PASSES[part](t) for t in times[key])


def link_time(times: Times, name: str, part: str) -> float:
    """Seconds that the link adds: T(link) - T(zero)."""
    return median(times, (name, "link"), part) - median(times, (name, "zero"), part)


def hidden_share(times: Times, name: str, part: str, standard: str = BLOCKING) -> float:
    return 1 - link_time(times, name, part) / link_time(times, standard, part)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def table(times: Times, link_s: float) -> str:
    names = list(dict.fromkeys(name for name, _ in times))
    out = [
        f"{'median ms':30}"
        + "".join(f"{p + ' ' + w:>16}" for p in PASSES for w in ("link", "zero")),
    ]
    for name in names:
        cells = [
            1e3 * statistics.median(PASSES[p](t) for t in times.get((name, w), times[name, "link"]))
            for p in PASSES
            for w in ("link", "zero")
        ]
        out.append(f"{name:30}" + "".join(f"{c:16.1f}" for c in cells))
    for standard, title in ((BLOCKING, "waiting at once"), ("standard", "megatron-core's")):
        title = f"hidden, against {title}"
        out += ["", f"{title:30}" + "".join(f"{p:>16}" for p in PASSES)]
        for name in names:
            if name not in (standard, BLOCKING, "no-comm"):
                shares = [hidden_share(times, name, p, standard) for p in PASSES]
                out.append(f"{name:30}" + "".join(f"{s:16.3f}" for s in shares))
    out += ["", f"{'(T_std - T) / (T_std - T_no-comm)':30}"]
    for name in names:
        if name not in (BLOCKING, "standard", "no-comm"):
            cells = []
            for p in PASSES:
                std, mine, bound = (
                    statistics.median(PASSES[p](t) for t in times[n, "link"])
                    for n in ("standard", name, "no-comm")
                )
                cells.append((std - mine) / (std - bound))
            out.append(f"{name:30}" + "".join(f"{c:16.3f}" for c in cells))
    out += [
        "",
        f"An all-reduce is {1e3 * link_s:.2f} ms on the link (modelled), on top of its own work.",
    ]
    return "\n".join(out)


def submodules(decoder: Decoder, args: argparse.Namespace, tp: int) -> tuple[Submodule, Submodule]:
    """Medians of attention's and MLP's own compute, for the planner's model of a pass."""
    recorder = Recorder(decoder, dist.get_rank())
    spans = [span for _ in range(3) for span in recorder.step()]

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


def planned(
    name: str,
    args: argparse.Namespace,
    parts: tuple[Submodule, Submodule],
    own_s: float,
    link_s: float,
) -> tuple[float, float]:
    """What the link adds to forward and backward by the planner's model (pretrain/bench/plan.py)."""
    n = args.layers
    kinds = {
        "hybrid (last half)": ["standard"] * (n - n // 2) + ["ladder"] * (n // 2),
        "standard": ["standard"] * n,
        "parallel": ["parallel"] * n,
        "ladder": ["ladder"] * n,
    }[name]
    with_link, without = (
        pass_seconds(
            kinds,
            *parts,
            seconds,
            sequence_parallel=args.sequence_parallel,
            recompute=args.recompute,
        )
        for seconds in (own_s + link_s, own_s)
    )
    return with_link[0] - without[0], with_link[1] - without[1]


def paired(a: list[tuple[float, ...]], b: list[tuple[float, ...]]) -> str:
    """The quotient of two lines' totals, repetition by repetition."""
    low, middle, high = quartiles([sum(x) / sum(y) for x, y in zip(a, b, strict=True)])
    return f"{middle:.3f} (quartiles {low:.3f} to {high:.3f})"


def main() -> None:
    args = arguments()
    if args.fake_tp is None and "RANK" not in os.environ:
        become_torchrun(TP, *sys.argv)
    tp = args.fake_tp or TP
    device = join(tp, fake=args.fake_tp is not None)

    names = ("standard", "parallel", "ladder", "hybrid (last half)", "no-comm")
    chosen = lines(args, tp, names)
    no_comm = next(line for line in chosen if line.name == "no-comm")
    passes = [slowest(no_comm.step(0.0)) for _ in range(6)][1:]
    submodule_s = statistics.median(forward for forward, _ in passes) / (2 * args.layers)
    ratio = args.link_ratio
    if args.link and args.target:
        ratio = target_ratio(args.target, args.link)
    link_s = ratio * submodule_s
    if args.link and not args.target:
        element_bytes = 4 if args.precision == "fp32" else 2
        size = args.seq_length * args.micro_batch_size * args.hidden_size * element_bytes
        link_s = LINKS[args.link].for_ranks(tp).all_reduce_seconds(size)
        ratio = link_s / submodule_s
    own_s = 0.0
    if device == "cpu" and args.fake_tp is None:
        message = torch.empty(args.seq_length, args.micro_batch_size, args.hidden_size)
        own_s = own_seconds(parallel_state.get_tensor_model_parallel_group(), message)

    runs: dict[tuple[str, str], Callable[[], tuple[float, ...]]] = {
        (line.name, way): lambda line=line, s=s: line.step(s)  # type: ignore[misc]
        for line in chosen
        for way, s in (("link", own_s + link_s), ("zero", 0.0))
        if not (line.name == "no-comm" and way == "zero")  # it has no collectives
    }
    parts = submodules(no_comm.decoder, args, tp)
    times = measure(runs, args.steps)
    if args.trace:
        with traced(args.trace):
            for name in ("standard", "ladder"):
                with ranges.named(name):
                    runs[name, "link"]()
    report: dict[str, Any] = {
        "measured": f"{tp} ranks, {device}, {platform.processor() or platform.machine()}",
        "modelled": f"an all-reduce is {link_s:.6f} s on the link, {ratio} x a sub-module's forward, "
        f"on top of its own {own_s:.6f} s",
        "versions": versions(),
        "command": " ".join(["python", *sys.argv]),
        "options": {k: str(v) for k, v in vars(args).items()},
        "link_s": link_s,
        "own_s": own_s,
        "planned_link_ms": {},
        "submodule_forward_s": submodule_s,
        "times_s": [{"kind": k, "link": w, "forward_backward": t} for (k, w), t in times.items()],
        "hidden_share": {
            against: {
                line.name: {p: hidden_share(times, line.name, p, against) for p in PASSES}
                for line in chosen
                if line.name not in (against, "no-comm")
            }
            for against in (BLOCKING, "standard")
        },
    }
    if dist.get_rank() == 0:
        print(table(times, link_s))
        zero = paired(times["ladder", "zero"], times["standard", "zero"])
        print(f"Ladder / standard step time, zero delay, TP={tp}: {zero}")
        print("\nms that the link adds, measured and by the planner's model of a pass")
        for name in ("standard", "parallel", "ladder", "hybrid (last half)"):
            plan_s = planned(name, args, parts, own_s, link_s)
            cells = [
                (1e3 * link_time(times, name, p), 1e3 * s)
                for p, s in zip(("forward", "backward"), plan_s, strict=True)
            ]
            print(f"{name:30}" + "".join(f"{m:10.1f} {s:7.1f}" for m, s in cells))
            report["planned_link_ms"][name] = {"measured_planned": cells}
        report["ladder_over_standard_zero_delay"] = zero
    if args.fake_tp is None:
        join(1)
        alone: dict[tuple[str, str], Callable[[], tuple[float, ...]]] = {
            (line.name, ""): lambda line=line: line.step(0.0)  # type: ignore[misc]
            for line in lines(args, 1, ("standard", "ladder"))
        }
        single = measure(alone, args.steps)
        ratio_1 = paired(single["ladder", ""], single["standard", ""])
        report["ladder_over_standard_tp1"] = ratio_1
        if dist.get_rank() == 0:
            print(f"Ladder / standard step time, TP=1: {ratio_1}")
    if dist.get_rank() == 0 and args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
