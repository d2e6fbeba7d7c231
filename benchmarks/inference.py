"""Generation with each residual kind over a modelled link: prefill and decode, beside the paper's table.

    python benchmarks/inference.py --json benchmarks/results/inference.json --picture docs/pictures/inference.png

A case is a shape of the paper, a link and a batch: prompt 1,024, 512 new tokens. How long attention, MLP
and an all-reduce take there is modelled (pretrain/bench/inference_plan.py). What is measured is how much
of the all-reduces' time the code hides:

On a CPU, real ranks (gloo) or, with --fake-tp N, one that plays rank 0 of N, run a reduced decoder with
its real cache and collectives. Its MLP is made so wide that MLP over attention is as in the case, and
an all-reduce is under way (pretrain/bench/wire.py) for as large a part of a layer's compute as there.

On one GPU, with --fake-tp 8, the layers have the case's shape, batch and prompt, as many as --layers
says, decode is a CUDA graph, and an all-reduce takes what is modelled.

A kind's hidden share of the link's time is 1 - (T_kind(link) - T_kind(zero)) over the same of standard,
which waits at once; its speed-up counts what the link adds to it, on top of the no-comm compute:
gloo's own work is left out, as a GPU's cores do not do it.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from megatron.core import parallel_state

from megatron_ladder.config import ModelConfig, ParallelConfig
from pretrain.bench.inference_decoder import InferenceDecoder, captured, seconds
from pretrain.bench.inference_plan import (
    KINDS,
    NEW_TOKENS,
    PHASES,
    PROMPT,
    SHAPES,
    Pass,
    generation_seconds,
    modelled_pass,
)
from pretrain.bench.interleaved import measure
from pretrain.bench.links import PRESETS as LINKS
from pretrain.bench.ranks import become_torchrun, join
from pretrain.bench.recorder import Recorder
from pretrain.bench.timeline import draw as draw_timeline
from pretrain.bench.wire import over, own_seconds

TP = 2
CASES = ("70b:nvswitch", "70b:p2p-off", "8b:nvswitch", "8b:p2p-off", "405b:two-nodes-ndr")
# arXiv 2501.06589, tokens/s of 70B at TP 8 on H100s: standard, parallel, ladder, no-comm.
PAPER = {
    "70b:nvswitch": {
        1: (77.39, 94.22, 101.22, 110.59),
        4: (258.56, 307.34, 331.45, 355.80),
        16: (843.15, 973.74, 1003.52, 1109.65),
        64: (1940.99, 2259.38, 2242.1, 2474.49),
    },
    "70b:p2p-off": {
        1: (51.66, 72.36, 82.59, None),
        4: (173.62, 241.08, 271.82, None),
        16: (546.68, 744.33, 738.56, None),
        64: (1454.42, 1873.71, 1864.05, None),
    },
}
COLOURS = {"parallel": "#E69F00", "ladder": "#0072B2", "no-comm": "#999999"}


@dataclass(frozen=True)
class Case:
    """One line of the tables."""

    name: str
    """shape:link"""
    batch: int
    phase: str

    @property
    def modelled(self) -> Pass:
        shape, link = self.name.split(":")
        return modelled_pass(SHAPES[shape], self.phase, batch=self.batch, link=link)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [f"{shape}:{link}" for shape in SHAPES for link in LINKS]
    parser.add_argument("--cases", nargs="+", choices=every, default=CASES, metavar="SHAPE:LINK")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--fake-tp", type=int, help="one process as rank 0 of this many")
    parser.add_argument("--steps", type=int, default=24, help="interleaved repetitions of decode")
    parser.add_argument("--prefill-steps", type=int, default=6, help="of prefill")
    parser.add_argument("--layers", type=int, default=24, help="on a GPU: as many as fit")
    reduced = parser.add_argument_group("the reduced decoder on a CPU")
    reduced.add_argument("--hidden-size", type=int, default=768)
    reduced.add_argument("--heads", type=int, default=8)
    reduced.add_argument("--sequences", type=int, default=2)
    reduced.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write every time measured")
    parser.add_argument("--picture", type=Path, help="draw speed-ups and hidden shares")
    parser.add_argument(
        "--timeline", type=Path, help="draw two layers of the first case, as traced"
    )
    args = parser.parse_args()
    if torch.cuda.is_available() and args.fake_tp is None:
        parser.error("on a GPU it plays one rank of many: --fake-tp 8")
    return args


def decoder(
    args: argparse.Namespace, case: Case, kind: str, ffn_hidden_size: int = 0, layers: int = 0
) -> InferenceDecoder:
    """Of the case's shape on a GPU, else the reduced one with so wide an MLP."""
    shape = SHAPES[case.name.split(":")[0]]
    tp = parallel_state.get_tensor_model_parallel_world_size()
    if torch.cuda.is_available():
        model = replace(shape.model, num_layers=args.layers)
        size = {"sequences": case.batch, "prompt_length": PROMPT, "new_tokens": NEW_TOKENS}
    else:
        model = ModelConfig(
            num_layers=layers or args.layers,
            hidden_size=args.hidden_size,
            ffn_hidden_size=ffn_hidden_size,
            num_attention_heads=args.heads,
        )
        size = {"sequences": args.sequences, "prompt_length": args.prompt_length, "new_tokens": 8}
    # Embedding and head do not run: the least there can be.
    model = replace(model, residual=kind, vocab_size=128 * tp)
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    return InferenceDecoder(model, parallel, precision=precision, **size)  # type: ignore[arg-type]


def run_of(decoder: InferenceDecoder, phase: str) -> Callable[[], object]:
    """A pass; decode finds the cache filled."""
    decoder.generate_half()
    return decoder.prefill if phase == "prefill" else decoder.decode


def submodules_s(args: argparse.Namespace, case: Case, ffn_hidden_size: int) -> tuple[float, float]:
    """Medians of attention's and the MLP's own seconds in the reduced decoder, the slower rank's."""
    few = decoder(args, case, "no-comm", ffn_hidden_size, layers=min(8, args.layers))
    run = run_of(few, case.phase)
    recorder = Recorder(few, dist.get_rank())
    spans = [span for _ in range(6) for span in recorder.forward(run)]
    medians = torch.tensor(
        [
            statistics.median(s.end_s - s.start_s for s in spans if s.name.startswith(kind))
            for kind in ("attention", "mlp")
        ],
        dtype=torch.float64,
    )
    dist.all_reduce(medians, op=dist.ReduceOp.MAX)
    return medians[0].item(), medians[1].item()


def balanced_width(args: argparse.Namespace, case: Case) -> int:
    """Of the reduced decoder's MLP, for MLP over attention as in the case."""
    wanted = case.modelled.mlp_s / case.modelled.attention_s
    step = 16 * parallel_state.get_tensor_model_parallel_world_size()
    width = 2 * args.hidden_size // step * step
    for _ in range(2):  # an MLP's time is not quite its width
        attention, mlp = submodules_s(args, case, width)
        width = max(1, round(width * wanted * attention / mlp / step)) * step
    return width


def measured(args: argparse.Namespace, case: Case) -> dict[str, Any]:
    """One case: its times and what they say. All ranks call alike."""
    modelled, on_gpu = case.modelled, torch.cuda.is_available()
    group = parallel_state.get_tensor_model_parallel_group()
    width = 0 if on_gpu else balanced_width(args, case)
    decoders = {kind: decoder(args, case, kind, width) for kind in KINDS}
    passes = {kind: run_of(decoders[kind], case.phase) for kind in KINDS}
    gc.collect()
    gc.freeze()  # or collecting before each pass would take longer than the pass
    link_s, own_s = modelled.all_reduce_s, 0.0
    if not on_gpu:
        computed = measure({"": lambda: seconds(passes["no-comm"])}, 5)[""]
        layer_s = statistics.median(s for (s,) in computed) / args.layers
        link_s *= layer_s / (modelled.attention_s + modelled.mlp_s)
        if args.fake_tp is None:
            tokens = args.prompt_length if case.phase == "prefill" else 1
            own_s = own_seconds(group, torch.empty(tokens, args.sequences, args.hidden_size))

    def run(kind: str, under_way_s: float) -> Callable[[], tuple[float]]:
        def link() -> Any:
            return over(group, lambda *_: under_way_s)

        if on_gpu and case.phase == "decode":
            with link():
                replay = captured(passes[kind])
            return lambda: seconds(replay)

        def once() -> tuple[float]:
            with link():
                return seconds(passes[kind])

        return once

    ways = {"link": own_s + link_s, "zero": 0.0}
    runs = {(kind, way): run(kind, s) for kind in KINDS[:-1] for way, s in ways.items()}
    runs["no-comm", "zero"] = run("no-comm", 0.0)  # it has no collectives
    steps = args.steps if case.phase == "decode" else args.prefill_steps
    times = measure(runs, steps)
    result = {
        **asdict(case),
        "modelled": {**asdict(modelled), **modelled_figures(modelled)},
        "reduced": {} if on_gpu else {"ffn_hidden_size": width, "layer_s": layer_s},
        "link_s": link_s,
        "own_s": own_s,
        "times_s": [
            {"kind": k, "link": w, "seconds": [s for (s,) in t]} for (k, w), t in times.items()
        ],
        **figures({key: statistics.median(s for (s,) in t) for key, t in times.items()}),
    }
    if args.timeline and not on_gpu:
        trace(args.timeline, decoders, passes, own_s + link_s)
        args.timeline = None
    gc.unfreeze()
    return result


def figures(medians: dict[tuple[str, str], float]) -> dict[str, dict[str, float]]:
    """Over no-comm compute, what the link adds to each kind; and the shares and speed-ups of it."""
    computed = medians["no-comm", "zero"]
    adds = {kind: medians[kind, "link"] - medians[kind, "zero"] for kind in KINDS[:-1]}
    adds["no-comm"] = 0.0
    return {
        "relative_time": {kind: 1 + s / computed for kind, s in adds.items()},
        "speed_up": {k: (computed + adds["standard"]) / (computed + adds[k]) for k in KINDS},
        "hidden_share": {k: 1 - adds[k] / adds["standard"] for k in ("parallel", "ladder")},
    }


def modelled_figures(modelled: Pass) -> dict[str, dict[str, float]]:
    standard = modelled.seconds("standard")
    return {
        "pass_s": {kind: modelled.seconds(kind) for kind in KINDS},
        "speed_up": {kind: standard / modelled.seconds(kind) for kind in KINDS},
        "hidden_share": {kind: modelled.hidden_share(kind) for kind in ("parallel", "ladder")},
    }


def whole(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prefill and decode together: tokens/s of each kind, by the model, and with its compute and the
    measured relative times."""
    cells = {(r["name"], r["batch"], r["phase"]): r for r in results}
    lines = []
    for name, batch in dict.fromkeys((r["name"], r["batch"]) for r in results):
        phases = [cells.get((name, batch, phase)) for phase in PHASES]
        if None in phases:
            continue
        line: dict[str, Any] = {"name": name, "batch": batch, "tokens_per_s": {}, "modelled": {}}
        for kind in KINDS:
            for way, passes in (
                ("modelled", [p["modelled"]["pass_s"][kind] for p in phases]),
                (
                    "tokens_per_s",
                    [p["modelled"]["pass_s"]["no-comm"] * p["relative_time"][kind] for p in phases],
                ),
            ):
                total_s = generation_seconds(SHAPES[name.split(":")[0]], batch, *passes)
                line[way][kind] = batch * NEW_TOKENS / total_s
        line["paper"] = dict(zip(KINDS, PAPER.get(name, {}).get(batch, ()), strict=False))
        lines.append(line)
    return lines


def trace(
    path: Path,
    decoders: dict[str, InferenceDecoder],
    passes: dict[str, Callable[[], object]],
    under_way_s: float,
) -> None:
    """Draws two neighbouring layers of each kind that waits for something."""
    group = parallel_state.get_tensor_model_parallel_group()
    rows = []
    for kind in KINDS[:-1]:
        recorder = Recorder(decoders[kind], dist.get_rank())
        with over(group, lambda *_: under_way_s, recorder):
            rows.append((kind, recorder.forward(passes[kind])))
    if dist.get_rank() == 0:
        middle = max(1, len(decoders["ladder"].block.layers) // 2)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_timeline(path, rows, layers=(middle, middle + 1))


def table(results: list[dict[str, Any]], lines: list[dict[str, Any]]) -> str:
    """Both of docs/inference.md's tables."""
    out = [
        "| | batch | ms a layer, modelled: attention, MLP, all-reduce | speed-up: parallel | ladder | "
        "no-comm (the bound) | hidden: parallel | ladder | by the model: parallel | ladder |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        m, up, share = r["modelled"], r["speed_up"], r["hidden_share"]
        parts = ", ".join(f"{1e3 * m[k]:.3f}" for k in ("attention_s", "mlp_s", "all_reduce_s"))
        cells = [f"{up[k]:.2f}" for k in KINDS[1:]]
        cells += [f"{s[k]:.2f}" for s in (share, m["hidden_share"]) for k in share]
        cells[4] = f"{share['ladder']:.3f}"
        out.append(f"| {r['name']} {r['phase']} | {r['batch']} | {parts} | {' | '.join(cells)} |")
    out += [
        "",
        "| tokens/s | batch | standard | parallel | ladder | no-comm | speed-up: parallel | ladder | "
        "no-comm | the paper's: parallel | ladder | no-comm | its hidden share |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for line in lines:
        rates, paper = line["tokens_per_s"], line["paper"]
        cells = [f"{rates[k]:.0f}" for k in KINDS]
        cells += [f"{rates[k] / rates['standard']:.2f}" for k in KINDS[1:]]
        cells += [f"{paper[k] / paper['standard']:.2f}" if paper.get(k) else "" for k in KINDS[1:]]
        cells.append(f"{paper_hidden(paper):.2f}" if paper.get("no-comm") else "")
        out.append(f"| {line['name']} | {line['batch']} | {' | '.join(cells)} |")
    return "\n".join(out)


def paper_hidden(rates: dict[str, float]) -> float:
    """(T_standard - T_ladder) / (T_standard - T_no-comm), T being one over the rate."""
    standard, ladder, bound = (1 / rates[k] for k in ("standard", "ladder", "no-comm"))
    return (standard - ladder) / (standard - bound)


def draw(path: Path, results: list[dict[str, Any]]) -> None:
    """A panel for each shape, link and phase: speed-up over standard by batch."""
    names = list(dict.fromkeys(r["name"] for r in results))
    phases = list(dict.fromkeys(r["phase"] for r in results))
    size = (2.9 * len(names) + 0.8, 2.6 * len(phases) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(phases), len(names), squeeze=False, sharey="col")
    for column, name in enumerate(names):
        for row, phase in enumerate(phases):
            panel = axes[row, column]
            cells = [r for r in results if (r["name"], r["phase"]) == (name, phase)]
            batches = [str(r["batch"]) for r in cells]
            for kind, colour in COLOURS.items():
                speed_ups = [r["speed_up"][kind] for r in cells]
                style = ":" if kind == "no-comm" else "-"
                panel.plot(batches, speed_ups, style, marker="o", color=colour, label=kind)
            panel.set_title(f"{name.replace(':', ', ')}: {phase}", fontsize=10)
            panel.grid(True, color="#e6e6e6")
            panel.spines[["top", "right"]].set_visible(False)
        axes[-1, column].set_xlabel("batch")
    for row in range(len(phases)):
        axes[row, 0].set_ylabel("speed-up over standard")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(path, dpi=110)


def main() -> None:
    args = arguments()
    if args.fake_tp is None and "RANK" not in os.environ:
        become_torchrun(TP, *sys.argv)
    tp = args.fake_tp or TP
    device = join(tp, fake=args.fake_tp is not None)
    report: dict[str, Any] = {
        "measured": f"{tp} ranks{' (one played)' if args.fake_tp else ''}, {device}, "
        f"{platform.processor() or platform.machine()}",
        "versions": {n: version(n) for n in ("torch", "megatron-core", "megatron-ladder")},
        "command": " ".join(["python", *sys.argv]),
        "options": {k: str(v) for k, v in vars(args).items()},
        "cases": [],
    }
    for name in args.cases:
        for phase in args.phases:
            for batch in args.batches:
                case = Case(name, batch, phase)
                if dist.get_rank() == 0:
                    print(f"{name}, batch {batch}, {phase}", file=sys.stderr)
                report["cases"].append(measured(args, case))
    report["whole"] = whole(report["cases"])
    if dist.get_rank() == 0:
        print(table(report["cases"], report["whole"]))
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=1) + "\n")
        if args.picture:
            draw(args.picture, report["cases"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
