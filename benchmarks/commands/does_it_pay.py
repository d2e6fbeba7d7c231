"""Does a ladder model pay? The planner's answers for six setups, and a picture of where each kind wins.

    python benchmarks/commands/does_it_pay.py --picture docs/pictures/does_it_pay.png

Nothing is measured: `megatron-ladder bench plan` models training (pretrain/plan), and
measuring/inference/plan.py models generation. What is printed is a part of docs/guides/does-it-pay.md.
"""

import argparse
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `measuring` is

from measuring.inference.plan import SHAPES, alternatives, modelled_pass
from megatron_ladder.config import ModelConfig
from pretrain.config.presets import PRESETS
from pretrain.plan.links import NVLINK
from pretrain.plan.links import PRESETS as LINKS
from pretrain.plan.planner import BF16, DEVICES, Hardware, pass_seconds, submodules
from pretrain.plan.search import WAYS, fitting, ranked, way
from pretrain.plan.table import PlanOptions, setup
from pretrain.plan.verdict import best_ladder, enough, named, rivals, verdict

ACROSS = 8  # tensor-parallel ranks over two nodes; 70B has no more key/value heads
TWO_NODES = "70B with TP over two nodes, on 64 GPUs"
SETUPS = {
    "8B on one node with NVLink": PlanOptions("llama-3-8b", 8),
    "8B on one node with PCIe alone": PlanOptions("llama-3-8b", 8, link="p2p-off"),
    "70B on 1,024 GPUs": PlanOptions("llama-3-70b", 1024),
    TWO_NODES: PlanOptions("llama-3-70b", 64, link="two-nodes"),
    "1B on one node": PlanOptions("paper-1b", 8),
}
DECODE = "405B decode, TP 16 over two nodes"


def answer(name: str) -> list[str]:
    """The paragraphs of one of SETUPS."""
    options = SETUPS[name]
    config, hardware = setup(options)
    fits = fitting(config, options.gpus, hardware.device)
    if name != TWO_NODES:
        return verdict(fits, ranked(fits, options.gpus, hardware), options.gpus, hardware)
    inside = ranked(fits, options.gpus, replace(hardware, link=None))
    across = {
        name: [c for c in configs if c.parallel.tensor_model_parallel_size == ACROSS]
        for name, configs in fits.items()
    }
    found = ranked(across, options.gpus, hardware)
    paragraphs = verdict(across, found, options.gpus, hardware)
    name, rival = min(rivals(inside).items(), key=lambda rival: rival[1].step_s)
    ladder, step_s = best_ladder(inside), best_ladder(found).step_s
    return [
        f"With TP {ACROSS} over two nodes in every layout: {paragraphs[0]}",
        *paragraphs[1:],
        f"With TP inside a node, {named(name, rival)} is {step_s / rival.step_s:.2f} times as fast as the "
        f"best of these, and {named(ladder.residual, ladder)} {step_s / ladder.step_s:.2f} times.",
    ]


def decode() -> list[str]:
    """What measuring/inference/plan.py says of generation, with no prompt."""
    shape, link = SHAPES["405b"], "two-nodes-ndr"
    lines = []
    for batch in (1, 16, 64):
        one = modelled_pass(shape, "decode", batch=batch, link=link)
        standard = one.seconds("standard")
        gains = [
            f"{kind} {standard / one.seconds(kind):.2f}"
            for kind in ("parallel", "ladder", "parallel-ladder")
        ]
        others = alternatives(shape, "decode", batch=batch, link=link)
        if batch > 1:
            gains.append(f"standard in halves {standard / others['standard, half-batches']:.2f}")
        lines.append(f"batch {batch}: {', '.join(gains)}")
    return [
        "By the model of generation a ladder kind pays here. The speed of the layers over standard's is, "
        f"at {'; at '.join(lines)}. Halves read all weights twice. A smaller TP is not compared: the "
        f"weights, in bf16, need {shape.tp} GPUs. Prefill, the head, and requests that come and go are not "
        "in it."
    ]


def region(model: ModelConfig, ratio: float, tokens: int, layers: int = 12) -> str:
    """The way that is enough, at TP 8 with sequence parallelism.

    Args:
        ratio: the time of an all-reduce, over the mean forward of a sub-module.
        tokens: of a micro-batch; its sequences have 2,048.
    """
    hardware = Hardware(DEVICES["h100"], NVLINK)
    link_s = ratio * _mean_submodule_s(model, tokens)
    seconds = {}
    for kind, overlap in WAYS:
        halves = overlap == "halves"
        if halves and tokens < 2 * SEQUENCE:
            continue
        calls = 2 if halves else 1
        parts = submodules(
            replace(model, residual=kind),
            hardware,
            tokens=tokens // calls,
            seq_length=SEQUENCE,
            tp=8,
            sp=True,
        )
        seconds[way(kind, overlap)] = sum(
            pass_seconds(
                *([kind] * layers, *parts, link_s / calls), sequence_parallel=True, halves=halves
            )
        )
    return enough(seconds)


SEQUENCE = 2048


def _mean_submodule_s(model: ModelConfig, tokens: int, tp: int = 8) -> float:
    hardware = Hardware(DEVICES["h100"], NVLINK)
    standard = replace(model, residual="standard")
    parts = submodules(standard, hardware, tokens=tokens, seq_length=SEQUENCE, tp=tp, sp=True)
    return sum(p.forward_s for p in parts) / 2


def draw(across: int = 56, up: int = 24) -> bytes:
    """The regions of two models as a PNG.

    Args:
        across, up: the number of points of each axis.
    """
    import matplotlib.colors
    import numpy as np
    from matplotlib.figure import Figure

    from pretrain.pictures import COLOURS, GREY, png_bytes

    names = [way(*each) for each in WAYS]
    palette = ["#DDDDDD", *(COLOURS[i] for i in (5, 3, 4, 0, 2))]
    ratios, tokens = np.geomspace(0.01, 8, across), np.geomspace(2048, 65536, up)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, preset in zip(panels, ("llama-3-8b", "llama-3-70b"), strict=True):
        model = PRESETS[preset]().model
        grid = [[names.index(region(model, r, int(t))) for r in ratios] for t in tokens]
        axes.pcolormesh(
            *(ratios, tokens, grid),
            cmap=matplotlib.colors.ListedColormap(palette),
            vmin=-0.5,
            vmax=len(names) - 0.5,
            shading="nearest",
        )
        for name, text in (("nvswitch", "NVSwitch"), ("p2p-off", "P2P off")):
            link = LINKS[name].for_ranks(8)
            line = [
                link.all_reduce_seconds(BF16 * t * model.hidden_size) / _mean_submodule_s(model, t)
                for t in tokens
            ]
            axes.plot(line, tokens, color="black", linewidth=1.2)
            axes.annotate(text, (line[2], tokens[2]), xytext=(4, 0), textcoords="offset points")
        axes.set(xscale="log", yscale="log", title=f"{preset}, TP 8, H100s")
        axes.set_xlim(ratios[0], ratios[-1])
        axes.set_xlabel("an all-reduce over the forward of a sub-module")
        axes.set_xticks([0.01, 0.1, 0.5, 1, 2, 5], ["0.01", "0.1", "0.5", "1", "2", "5"])
        axes.set_yticks(
            [2048, 4096, 8192, 16384, 32768, 65536], ["2k", "4k", "8k", "16k", "32k", "64k"]
        )
        axes.minorticks_off()
    panels[0].set_ylabel("tokens of a micro-batch (2,048 a sequence)")
    patches = [
        matplotlib.patches.Patch(color=colour, label=name.replace(", halves", " in halves"))
        for name, colour in zip(names, palette, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    figure.suptitle(
        "The way that changes the model least, of those within 1 % of the fastest (modelled)",
        fontsize=11,
    )
    figure.text(0.995, 0.005, "12 layers, forward and backward", ha="right", fontsize=8, color=GREY)
    return png_bytes(figure)


def page() -> Iterator[str]:
    """The guide's sections, a line at a time."""
    for name, options in SETUPS.items():
        link = f" --link {options.link}" if options.link else ""
        yield f"**{name}.** `--preset {options.preset} --gpus {options.gpus}{link}`\n"
        if name == TWO_NODES:
            yield (
                "The command ranks smaller TP sizes too, so its figures differ. These are by the script, "
                f"with TP {ACROSS} alone:\n"
            )
        yield from (_quoted(paragraph) for paragraph in answer(name))
    yield f"**{DECODE}.** By `benchmarks/measuring/inference/plan.py`, with NDR InfiniBand:\n"
    yield from (_quoted(paragraph) for paragraph in decode())


def _quoted(paragraph: str) -> str:
    return textwrap.fill(paragraph, 106, initial_indent="> ", subsequent_indent="> ") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picture", type=Path, help="draw the regions to this PNG")
    args = parser.parse_args()
    for line in page():
        print(line)
    if args.picture:
        args.picture.write_bytes(draw())


if __name__ == "__main__":
    main()
