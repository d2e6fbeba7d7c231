r"""How much faster does each residual kind generate over a modelled link, in prefill and in decode?

    python benchmarks/inference.py --json benchmarks/results/inference.json \
        --picture docs/pictures/inference.png --timeline docs/pictures/inference_timeline.png

A case is a shape of the paper, a link and a batch, with a prompt of 1,024 and 512 new tokens. How long
attention, MLP and an all-reduce take there is modelled (measuring/inference/plan.py). The share of the
all-reduces' time that is hidden is measured:

On a CPU a reduced decoder runs, with its real cache and collectives: on real ranks (gloo), or on one that
plays rank 0 of N (--fake-tp N). Its MLP is as wide as it must be for MLP over attention to be as in the
case. An all-reduce is under way (pretrain/bench/wire.py) for as large a part of a layer's compute as there.
Batch and prompt of the case come in through these two ratios alone.

On one GPU, with --fake-tp 8, the layers have the case's shape, batch and prompt, and --layers says how
many there are. Decode is a CUDA graph, and an all-reduce takes as long as modelled.

With --alternatives, other ways to wait less are measured too: ladder with all-reduces in int8 or in two
messages each, and parallel in two half-batches.

A kind's hidden share is 1 - (T_kind(link) - T_kind(zero)) / (T_standard(link) - T_standard(zero)), as
standard waits for each all-reduce at once. Its speed-up counts the time that the link adds to it, on top of
the compute of no-comm. gloo's own work is left out, as on a GPU the cores do not do it.
"""

import argparse
import gc
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import measuring  # noqa: F401  # isort: skip (before megatron-core: which cuDNN is loaded)
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from measuring import facts, ranks
from measuring.inference.decoder import InferenceDecoder, captured, seconds
from measuring.inference.plan import (
    BUILT,
    KINDS,
    NEW_TOKENS,
    PHASES,
    PROMPT,
    SHAPES,
    Pass,
    modelled_pass,
)
from measuring.inference.report import draw, figures, modelled_figures, tables, whole
from measuring.options import parser_of
from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.inference.sums import set_all_reduce
from pretrain.bench.interleaved import measure, slowest
from pretrain.bench.recorder import Recorder
from pretrain.bench.timeline import draw as draw_timeline
from pretrain.bench.wire import LinkSeconds, over, own_seconds
from pretrain.plan.links import PRESETS as LINKS

CASES = ("70b:nvswitch", "70b:p2p-off", "8b:nvswitch", "8b:p2p-off", "405b:two-nodes-ndr")
WIDTHS = 2, 8  # of the MLPs whose time is taken to know how it grows, in hidden sizes


@dataclass(frozen=True)
class Case:
    """One line of the tables."""

    shape: str
    link: str
    batch: int
    phase: str

    @property
    def modelled(self) -> Pass:
        return modelled_pass(SHAPES[self.shape], self.phase, batch=self.batch, link=self.link)


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    every = [f"{shape}:{link}" for shape in SHAPES for link in LINKS]
    parser.add_argument("--cases", nargs="+", choices=every, default=CASES, metavar="SHAPE:LINK")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--alternatives", action="store_true", help="on a CPU: other ways as well")
    ranks.add_fake_tp(parser)
    parser.add_argument("--steps", type=int, default=16, help="interleaved repetitions of decode")
    parser.add_argument("--prefill-steps", type=int, default=6, help="of prefill")
    parser.add_argument("--layers", type=int, default=24, help="on a GPU: as many as fit")
    reduced = parser.add_argument_group("the reduced decoder on a CPU")
    reduced.add_argument("--hidden-size", type=int, default=512)
    reduced.add_argument("--heads", type=int, default=8)
    reduced.add_argument("--sequences", type=int, default=2)
    reduced.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--picture", type=Path, help="draw speed-ups by batch")
    parser.add_argument(
        "--timeline", type=Path, help="draw two layers of the first case, as traced"
    )
    args = parser.parse_args()
    if torch.cuda.is_available() and args.fake_tp is None:
        parser.error("on a GPU it plays one rank of many: --fake-tp 8")
    if torch.cuda.is_available() and args.alternatives:
        parser.error("--alternatives is for the reduced decoder, on a CPU")
    if args.alternatives and args.fake_tp is None:
        parser.error("--alternatives needs one played rank: --fake-tp 2")
    return args


def reduced_decoder(args: argparse.Namespace, kind: Any, ffn_hidden_size: int) -> InferenceDecoder:
    tp = parallel_state.get_tensor_model_parallel_world_size()
    model = ModelConfig(
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=args.heads,
        vocab_size=128 * tp,
        residual=kind,
    )
    return InferenceDecoder(
        model,
        ParallelConfig(tensor_model_parallel_size=tp),
        sequences=args.sequences,
        prompt_length=args.prompt_length,
        new_tokens=8,
    )


def true_decoder(args: argparse.Namespace, kind: Any, case: Case) -> InferenceDecoder:
    """Of the case's shape, batch and prompt, in bf16. Embedding and head do not run: small ones."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    model = replace(
        SHAPES[case.shape].model, num_layers=args.layers, vocab_size=128 * tp, residual=kind
    )
    return InferenceDecoder(
        model,
        ParallelConfig(tensor_model_parallel_size=tp),
        sequences=case.batch,
        prompt_length=PROMPT,
        new_tokens=NEW_TOKENS,
        precision="bf16",
    )


def run_of(decoder: InferenceDecoder, phase: str) -> Callable[[], object]:
    """A pass; decode finds the cache filled."""
    decoder.generate_half()
    return decoder.prefill if phase == "prefill" else decoder.decode


def submodules_s(decoder: InferenceDecoder, phase: str) -> tuple[float, float]:
    """Medians of attention's and the MLP's own seconds, the slower rank's. Leaves hooks behind."""
    run, recorder = run_of(decoder, phase), Recorder(decoder, dist.get_rank())
    spans = [span for _ in range(8) for span in recorder.forward(run)]
    attention, mlp = (
        statistics.median(s.end_s - s.start_s for s in spans if s.name.startswith(kind))
        for kind in ("attention", "mlp")
    )
    attention, mlp = slowest((attention, mlp))
    return attention, mlp


def balanced_width(args: argparse.Namespace, phase: str) -> Callable[[float], int]:
    """How wide an MLP has to be for a given MLP over attention: its time grows evenly with its width."""
    step = 32 * parallel_state.get_tensor_model_parallel_world_size()
    widths = [w * args.hidden_size // step * step for w in WIDTHS]
    parts = [submodules_s(reduced_decoder(args, "no-comm", w), phase) for w in widths]
    attention = statistics.mean(a for a, _ in parts)
    (_, low), (_, high) = parts
    slope = (high - low) / (widths[1] - widths[0])

    def width(mlp_over_attention: float) -> int:
        exact = widths[0] + (mlp_over_attention * attention - low) / slope
        return min(max(step, round(exact / step) * step), 4 * widths[1])

    return width


def other_ways(
    case: Case, decoders: dict[str, InferenceDecoder], passes: dict[str, Callable[[], object]]
) -> dict[str, tuple[Callable[[], object], LinkSeconds]]:
    """Passes of alternatives, and how long each of their collectives is under way in the case itself."""
    half_s = case.modelled.half_all_reduce_s
    parallel = decoders["parallel"]
    halves = parallel.prefill_in_halves if case.phase == "prefill" else parallel.decode_in_halves

    def in_int8() -> None:
        set_all_reduce(decoders["ladder"].block, "int8")
        passes["ladder"]()
        set_all_reduce(decoders["ladder"].block, "exact")

    ways = {
        # An all-to-all and an all-gather of half the bytes move half of what an all-reduce does, each.
        "ladder, 8-bit sums": (in_int8, lambda *_: half_s / 2),
        "ladder, in two parts": (passes["ladder"], lambda *_: 2 * half_s),
        "parallel, half-batches": (halves, lambda *_: half_s),
    }
    assert tuple(ways) == BUILT
    return ways if case.batch > 1 else dict(list(ways.items())[:-1])


def measured(
    args: argparse.Namespace,
    case: Case,
    decoders: dict[str, InferenceDecoder],
    passes: dict[str, Callable[[], object]],
) -> dict[str, Any]:
    """One case: its times, and the shares and speed-ups they give. All ranks call it."""
    modelled, on_gpu = case.modelled, torch.cuda.is_available()
    group = parallel_state.get_tensor_model_parallel_group()
    link_s, own_s = modelled.all_reduce_s, 0.0
    computed = measure({"": lambda: seconds(passes["no-comm"])}, 5)[""]
    layer_s = statistics.median(s for (s,) in computed) / args.layers
    scale = 1.0 if on_gpu else layer_s / (modelled.attention_s + modelled.mlp_s)
    link_s *= scale
    if not on_gpu and args.fake_tp is None:
        tokens = args.prompt_length if case.phase == "prefill" else 1
        own_s = own_seconds(group, torch.empty(tokens, args.sequences, args.hidden_size))

    def slowed(
        one_pass: Callable[[], object], under_way: LinkSeconds, scale: float
    ) -> Callable[[], tuple[float, ...]]:
        def once() -> tuple[float, ...]:
            with over(group, lambda *message: scale * under_way(*message)):
                return seconds(one_pass)

        return once

    def run(kind: str, under_way_s: float) -> Callable[[], tuple[float, ...]]:
        def link() -> Any:
            return over(group, lambda *_: under_way_s)

        if on_gpu and case.phase == "decode":
            with link():
                replay = captured(passes[kind])
            return lambda: seconds(replay)

        return slowed(passes[kind], lambda *_: under_way_s, 1.0)

    ways = {"link": own_s + link_s, "zero": 0.0}
    runs = {(kind, way): run(kind, s) for kind in KINDS[:-1] for way, s in ways.items()}
    runs["no-comm", "zero"] = run("no-comm", 0.0)  # it has no collectives
    if args.alternatives:
        for name, (one_pass, under_way) in other_ways(case, decoders, passes).items():
            runs[name, "link"] = slowed(one_pass, under_way, scale)
    steps = args.steps if case.phase == "decode" else args.prefill_steps
    times = {key: [s for (s,) in found] for key, found in measure(runs, steps).items()}
    return {
        **asdict(case),
        "modelled": {**asdict(modelled), **modelled_figures(modelled)},
        "layer_s": layer_s,
        "link_s": link_s,
        "own_s": own_s,
        "times_s": [{"kind": k, "link": w, "seconds": t} for (k, w), t in times.items()],
        **figures(times),
    }


def trace(
    path: Path,
    decoders: dict[str, InferenceDecoder],
    passes: dict[str, Callable[[], object]],
    under_way_s: float,
) -> None:
    """Draws two neighbouring layers of each kind that has collectives. Leaves hooks behind."""
    group = parallel_state.get_tensor_model_parallel_group()
    rows = []
    for kind in KINDS[:-1]:
        recorder = Recorder(decoders[kind], dist.get_rank())
        with over(group, lambda *_: under_way_s, recorder):
            spans = [recorder.forward(passes[kind]) for _ in range(3)]
        rows.append((kind, spans[-1]))
    if dist.get_rank() == 0:
        middle = max(1, len(decoders["ladder"].block.layers) // 2)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_timeline(path, rows, layers=(middle, middle + 1))


def together(args: argparse.Namespace, cases: list[Case], width: int) -> list[dict[str, Any]]:
    """Measures cases that differ in the link alone, with the same decoders."""
    on_gpu, phase = torch.cuda.is_available(), cases[0].phase
    decoders = {
        kind: true_decoder(args, kind, cases[0]) if on_gpu else reduced_decoder(args, kind, width)
        for kind in KINDS
    }
    passes = {kind: run_of(decoders[kind], phase) for kind in KINDS}
    gc.collect()
    gc.freeze()  # else collecting garbage before a pass takes longer than the pass
    results = [measured(args, case, decoders, passes) for case in cases]
    if not on_gpu:
        if args.timeline:
            trace(args.timeline, decoders, passes, results[0]["own_s"] + results[0]["link_s"])
            args.timeline = None
        attention_s, mlp_s = submodules_s(decoders["no-comm"], phase)
        reduced = {"ffn_hidden_size": width, "attention_s": attention_s, "mlp_s": mlp_s}
        results = [{**result, "reduced": reduced} for result in results]
    gc.unfreeze()
    return results


def main() -> None:
    args = arguments()
    tp, device = ranks.start(args)
    report: dict[str, Any] = {
        "measured": f"{tp} ranks{' (one played)' if args.fake_tp else ''}, {device}, "
        f"{platform.processor() or platform.machine()}",
        **facts.header(device, args),
    }
    results = []
    pairs = [name.split(":") for name in args.cases]
    for phase in args.phases:
        width = None if torch.cuda.is_available() else balanced_width(args, phase)
        for shape in dict.fromkeys(shape for shape, _ in pairs):
            for batch in args.batches:
                cases = [Case(shape, link, batch, phase) for s, link in pairs if s == shape]
                if dist.get_rank() == 0:
                    print(f"{phase}, {shape}, batch {batch}", file=sys.stderr)
                modelled = cases[0].modelled  # the link does not matter here
                ratio = modelled.mlp_s / modelled.attention_s
                results += together(args, cases, width(ratio) if width else 0)
                report |= {"cases": results, "whole": whole(results)}
                if dist.get_rank() == 0:
                    facts.write(args.json, report)  # so far: the run may be ended early
    if dist.get_rank() == 0:
        print(tables(report))
        if args.picture:
            draw(args.picture, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
