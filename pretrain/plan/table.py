"""`megatron-ladder bench plan`: its options, and the table, picture and file that it makes."""

import dataclasses
import difflib
import io
import json
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_ladder.config import ParallelConfig, Residual
from megatron_ladder.errors import UserError
from megatron_ladder.fp8 import Fp8Config, Fp8Recipe
from pretrain.config.presets import OF_A_MODEL, PRESETS
from pretrain.config.train import TrainConfig
from pretrain.files import write_atomically
from pretrain.plan.estimate import STORAGE_BYTES_PER_S, estimate, format_estimate
from pretrain.plan.experts import has_experts
from pretrain.plan.links import network_of
from pretrain.plan.planner import DEVICES, Hardware
from pretrain.plan.search import Row, fitting, ranked
from pretrain.plan.verdict import LEARNED_WORST, verdict

FP8: Fp8Recipe = "tensorwise"
"""The recipe of --fp8."""


@dataclass(frozen=True)
class PlanOptions:
    """Does a ladder model pay on a cluster? Rank the layouts of a preset, for each residual kind, with the
    collectives of standard and parallel layers hidden in halves too. Modelled, not measured."""

    preset: str
    """A preset of `train` with a model of its own; its model, sequence length and global batch."""
    gpus: int
    seq_length: int | None = None
    """None: the preset's."""
    global_batch_size: int | None = None
    """Sequences a step. None: the preset's."""
    device: Literal["h100", "h200", "a100"] = "h100"
    link: Literal["nvswitch", "p2p-off", "two-nodes", "zero"] | None = None
    """Between tensor-parallel ranks; None: nvswitch up to 8 of them, two-nodes beyond."""
    network_gbit_per_s: float = 400.0
    """Of each GPU's NIC, for pipeline stages and data parallelism."""
    storage_gb_per_s: float = STORAGE_BYTES_PER_S / 1e9
    """At which all ranks together write and read checkpoints."""
    fp8: bool = False
    """The layers' GEMMs in FP8 (recipe tensorwise), and what memory that takes."""
    top: int = 3
    """Layouts to print of each residual kind, and of its halves."""
    json: Path | None = None
    """Write every layout that fits."""
    png: Path | None = None
    """Draw the best layout of each residual kind, and of its halves."""


def setup(options: PlanOptions) -> tuple[TrainConfig, Hardware]:
    """The run to lay out, and the GPUs and links. Raises UserError on wrong options."""
    names = [name for name in PRESETS if name not in OF_A_MODEL]
    if options.preset not in names:
        near = difflib.get_close_matches(options.preset, names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"no preset {options.preset!r}{hint}: choose one of {', '.join(names)}")
    rates = (options.network_gbit_per_s, options.storage_gb_per_s)
    counts = (options.gpus, options.top, options.global_batch_size or 1)
    if min(counts) < 1 or options.global_batch_size == 0 or not all(0 < r < 1e9 for r in rates):
        raise UserError(
            "--gpus, --top, --global-batch-size, --network-gbit-per-s and --storage-gb-per-s must be "
            "numbers of more than 0"
        )
    for name in ("json", "png"):
        file = getattr(options, name)
        if file is not None and (file.is_dir() or not file.name or not file.parent.is_dir()):
            raise UserError(f"--{name} {file} is no file in a folder that exists: give one")
    config = PRESETS[options.preset]()
    if options.fp8 and has_experts(config.model):
        raise UserError(
            f"--fp8 does not go with the experts of --preset {options.preset}: leave it out"
        )
    model, data = config.model, config.data
    if options.seq_length is not None:
        data = replace(data, seq_length=options.seq_length)
        longest = max(model.max_position_embeddings, options.seq_length)
        model = replace(model, max_position_embeddings=longest)
    if model.vocab_size is None:
        model = replace(model, vocab_size=32_000)  # assumed: the tokenizer may not exist yet
    batch = options.global_batch_size or config.global_batch_size
    device = DEVICES[options.device]
    if options.fp8 and not device.fp8:
        raise UserError(f"--fp8: {options.device} has no fp8 units: leave --fp8 out")
    config = replace(
        config,
        model=model,
        data=data,
        global_batch_size=batch,
        precision="bf16",
        parallel=ParallelConfig(),  # the preset's is one of many
        fp8=Fp8Config(FP8 if options.fp8 else None),
    )
    network = network_of(options.network_gbit_per_s)
    return config, Hardware(device, network, link=options.link, fp8=options.fp8)


def main_plan(options: PlanOptions) -> int:
    """Prints the plan. Raises UserError on wrong options, and when no layout fits."""
    config, hardware = setup(options)
    fits = fitting(config, options.gpus, hardware.device)
    found = ranked(fits, options.gpus, hardware)
    link = options.link or "nvswitch up to TP 8, two-nodes beyond"
    experts = has_experts(config.model)
    uneven = f"fullest expert {hardware.expert_imbalance:g}x the mean; " if experts else ""
    peak = f"FP8 {FP8}, MFU of the bf16 peak; " if options.fp8 else ""
    print(
        f"{options.preset} on {options.gpus} x {options.device}: modelled, not measured.\n"
        f"Assumed: {hardware.gemm_efficiency:.0%} of the GEMM peak, "
        f"{hardware.attention_efficiency:.0%} in attention; link {link}; {uneven}{peak}"
        f"{options.network_gbit_per_s:g} Gb/s a GPU between nodes; sequence {config.data.seq_length}, "
        f"global batch {config.global_batch_size}. docs/design/planner.md says what the model leaves out.\n"
    )
    for paragraph in verdict(fits, found, options.gpus, hardware):
        print(textwrap.fill(paragraph, width=108))
    same = "standard alone" if experts else "standard in halves"
    warning = (
        f"{same} computes what standard does. The other kinds are other models: compare their "
        f"loss as well (docs/guides/does-it-pay.md). {LEARNED_WORST} Speed alone is no reason to take it."
    )
    print(textwrap.fill(warning, width=108) + "\n")
    print(table(found, options.top))
    kind: Residual = config.model.residual if config.model.residual in found else "standard"
    chosen = laid_out(replace(config, model=replace(config.model, residual=kind)), found[kind][0])
    print(f"\nThe preset's run with the first {kind} layout:")
    storage = options.storage_gb_per_s * 1e9
    found_run = estimate(chosen, ranks=options.gpus, hardware=hardware, storage_bytes_per_s=storage)
    print(format_estimate(found_run))
    if options.json:
        rows = {kind: [dataclasses.asdict(r) for r in rows] for kind, rows in found.items()}
        write_atomically(options.json, json.dumps(rows, indent=1) + "\n")
    if options.png:
        write_atomically(options.png, draw({kind: rows[0] for kind, rows in found.items()}))
    return 0


def laid_out(config: TrainConfig, layout: Row) -> TrainConfig:
    """The configuration, changed to a row's layout."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sequence_parallel,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        num_layers_in_last_pipeline_stage=layout.last_stage if layout.pp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        tp_overlap="halves" if layout.halves else "none",
    )
    return replace(
        config,
        parallel=parallel,
        micro_batch_size=layout.micro_batch_size,
        recompute=layout.recompute,
    )


def table(found: dict[str, list[Row]], top: int) -> str:
    """The `top` fastest layouts of each way as a table.

    Each is compared with the fastest standard layout without halves, and with the standard kind without
    halves at the same layout.
    """
    standard = {r.layout: r for r in found["standard"]}
    best = found["standard"][0]
    lines = [
        f"{'':17}{'TP':>4}{'CP':>4}{'EP':>4}{'PP':>4}{'last':>5}{'VPP':>4}{'DP':>5}{'mbs':>4} "
        f"{'recompute':10}{'step s':>8}{'MFU':>7}{'GB':>6}{'bubble':>8}{'TP exposed':>11}{'EP exposed':>11}"
        f"{'x best std':>11}{'x same std':>13}"
    ]
    for name, rows in found.items():
        for row in rows[:top]:
            same = standard.get(row.layout)
            against_same = f"{same.step_s / row.step_s:13.3f}" if same else f"{'does not fit':>13}"
            lines.append(
                f"{name:17}{row.tp:4}{row.cp:4}{row.ep:4}{row.pp:4}{row.last_stage:5}{row.vpp:4}{row.dp:5}"
                f"{row.micro_batch_size:4} "
                f"{row.recompute:10}{row.step_s:8.2f}{row.mfu:7.1%}{row.memory_gb:6.0f}"
                f"{row.bubble:8.1%}{row.exposed_tp:11.1%}{row.exposed_ep:11.1%}"
                f"{best.step_s / row.step_s:11.3f}{against_same}"
            )
    return "\n".join(lines)


def _sizes(row: Row) -> str:
    ep = f" EP{row.ep}" if row.ep > 1 else ""
    return f"TP{row.tp} CP{row.cp}{ep} PP{row.pp} VPP{row.vpp} DP{row.dp}"


def draw(best: dict[str, Row]) -> bytes:
    """A PNG of the parts of a step's time, with one bar for each way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from pretrain.pictures import COLOURS

    figure = Figure(figsize=(9, 1.2 + 0.7 * len(best)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [f"{kind}\n{_sizes(r)}" for kind, r in best.items()]
    left = [0.0] * len(best)
    parts = {
        "compute": "compute_s",
        "tensor parallelism, exposed": "exposed_tp_s",
        "context parallelism, exposed": "exposed_cp_s",
        "experts' all-to-alls, exposed": "exposed_ep_s",
        "bubble": "bubble_s",
        "stages' transfers": "transfers_s",
        "data parallelism, exposed": "exposed_dp_s",
    }
    for (label, field), colour in zip(parts.items(), COLOURS, strict=False):
        widths = [getattr(r, field) for r in best.values()]
        axes.barh(names, widths, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds a step (modelled)")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()
