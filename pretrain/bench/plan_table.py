"""`megatron-ladder bench plan`: every layout of a model on so many GPUs, by modelled step time.

plan.py is the model of a layer's time and memory; here it becomes a step, a search and a table.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_ladder.config import ParallelConfig, Recompute, Residual, check_layout
from megatron_ladder.errors import UserError
from pretrain.bench.links import GPUS_PER_NODE, NVLINK, Network, network_of
from pretrain.bench.plan import (
    BF16,
    DEVICES,
    FP32,
    Hardware,
    memory_bytes,
    pass_seconds,
    preset_config,
    stage_parameters,
    submodules,
)
from pretrain.config import TrainConfig, to_dict
from pretrain.files import write_atomically
from pretrain.metrics import flops_per_token

RESIDUALS: tuple[Residual, ...] = ("standard", "parallel", "ladder")
# Selective recomputation is left out: with flash attention it costs time and saves nothing.
RECOMPUTES: tuple[Recompute, ...] = ("none", "full")
# The rest is for what memory_bytes does not count.
USABLE_MEMORY = 0.92


@dataclass(frozen=True)
class PlanOptions:
    """Rank the layouts of a model on a cluster by modelled, not measured, step time."""

    preset: str
    """Whose shapes; a preset of `train`."""
    gpus: int
    seq_length: int | None = None
    """Tokens in a sequence; None: the preset's."""
    global_batch_size: int | None = None
    """Sequences a step, over all GPUs; None: the preset's."""
    device: Literal["h100", "h200", "a100"] = "h100"
    """The link tables are H100s' with any."""
    link: Literal["nvswitch", "p2p-off", "two-nodes", "zero"] | None = None
    """Under tensor parallelism; None: nvswitch up to 8 ranks, two-nodes beyond."""
    network_gbit_per_s: float = 400.0
    """Of each GPU's NIC, for data and pipeline parallelism."""
    fp8: bool = False
    """The layers' GEMMs in fp8."""
    gemm_efficiency: float = 0.65
    """Share of the peak that GEMMs reach."""
    attention_efficiency: float = 0.5
    """Share of the bf16 peak that flash attention reaches."""
    top: int = 5
    """Layouts to print for each residual kind."""
    json: Path | None = None
    """Write every layout here."""
    png: Path | None = None
    """Draw the best layout of each kind here."""

    def __post_init__(self) -> None:
        for name in ("gpus", "seq_length", "global_batch_size", "top"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: it must be at least 1")
        for name in ("gemm_efficiency", "attention_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                option = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise UserError(f"{option}: a share of the peak, above 0 and up to 1")
        if self.network_gbit_per_s <= 0:
            raise UserError(
                f"--network-gbit-per-s {self.network_gbit_per_s}: it must be above 0, such as 400"
            )
        if self.fp8 and not DEVICES[self.device].fp8:
            raise UserError(f"--fp8: {self.device} has no fp8 GEMMs: leave it out, or take h100")

    def hardware(self) -> Hardware:
        # One node has no NIC in the way.
        network = network_of(self.network_gbit_per_s) if self.gpus > GPUS_PER_NODE else NVLINK
        return Hardware(
            DEVICES[self.device],
            network,
            self.link,
            self.fp8,
            self.gemm_efficiency,
            self.attention_efficiency,
        )

    def config(self) -> TrainConfig:
        """The preset, at these sequences and batch."""
        config = preset_config(self.preset)
        seq_length = self.seq_length or config.data.seq_length
        # Planning builds no position table: longer sequences than the preset's are fine.
        positions = max(config.model.max_position_embeddings, seq_length)
        return replace(
            config,
            model=replace(config.model, max_position_embeddings=positions),
            data=replace(config.data, seq_length=seq_length),
            parallel=ParallelConfig(),
            global_batch_size=self.global_batch_size or config.global_batch_size,
        )


@dataclass(frozen=True)
class Row:
    """One layout of one residual kind, modelled. The seconds add up to step_s."""

    residual: str
    tp: int
    pp: int
    vpp: int
    dp: int
    sequence_parallel: bool
    micro_batch_size: int
    recompute: str
    step_s: float
    compute_s: float
    exposed_tp_s: float
    bubble_s: float
    transfers_s: float
    """Sends between pipeline stages that nothing hides."""
    exposed_dp_s: float
    bubble: float
    """Share of step_s."""
    exposed_tp: float
    """Share of step_s."""
    tokens_per_s_per_gpu: float
    mfu: float
    """Of the bf16 peak, with fp8 too; recomputation does not count."""
    memory_gb: float

    @property
    def layout(self) -> tuple[object, ...]:
        """All but the residual kind."""
        sizes = (self.tp, self.pp, self.vpp, self.dp, self.sequence_parallel)
        return (*sizes, self.micro_batch_size, self.recompute)


def estimate(config: TrainConfig, gpus: int, hardware: Hardware) -> Row:
    """Time and memory of a layout.

    step = (m + (pp - 1) / vpp) x slowest stage + exposed data parallelism + optimizer, for m
    micro-batches. A stage is the sum of its chunks, each with all its collectives complete at its
    boundaries, of the embedding or the head, and of the sends that nothing hides: both directions of
    each micro-batch with 1F1B, and interleaved what is longer than a chunk's pass. The bubble is
    (pp - 1) / vpp such stages.

    Data parallelism reduce-scatters fp32 gradients behind the last micro-batch's backward and gathers
    bf16 parameters behind the next forward; the excess counts. The optimizer's update is bound by
    memory: 30 B a parameter, read or written, over dp.
    """
    model, parallel = config.model, config.parallel
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.num_chunks
    dp = parallel.data_parallel_size(gpus)
    micro_batches = config.num_microbatches(dp)

    stages = [_stage_seconds(config, hardware, stage) for stage in range(pp)]
    slowest = max(stages, key=lambda s: s.forward_s + s.backward_s)
    stage_s = slowest.forward_s + slowest.backward_s
    transfers_s = _transfers_seconds(config, hardware, slowest)
    fill = (pp - 1) / vpp

    most_parameters = max(
        stage_parameters(config, first=s == 0, last=s == pp - 1) for s in (0, pp - 1)
    )
    network = _data_parallel_network(hardware, parallel.tensor_model_parallel_size)
    sent = most_parameters * (dp - 1) / dp
    exposed_dp_s = max(0.0, network.seconds(FP32 * sent) - slowest.backward_s)
    exposed_dp_s += max(0.0, network.seconds(BF16 * sent) - slowest.forward_s)
    optimizer_s = hardware.memory_s(30 * most_parameters / dp)

    bubble_s = fill * (stage_s + transfers_s)
    step_s = micro_batches * (stage_s + transfers_s) + bubble_s + exposed_dp_s + optimizer_s
    tokens_per_s = config.tokens_per_step / step_s / gpus
    flops = flops_per_token(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        seq_length=config.data.seq_length,
        matmul_parameters=model.num_matmul_parameters(),
    )
    return Row(
        residual=model.residual,
        tp=parallel.tensor_model_parallel_size,
        pp=pp,
        vpp=vpp,
        dp=dp,
        sequence_parallel=parallel.sequence_parallel,
        micro_batch_size=config.micro_batch_size,
        recompute=config.recompute,
        step_s=step_s,
        compute_s=micro_batches * (stage_s - slowest.exposed_tp_s) + optimizer_s,
        exposed_tp_s=micro_batches * slowest.exposed_tp_s,
        bubble_s=bubble_s,
        transfers_s=micro_batches * transfers_s,
        exposed_dp_s=exposed_dp_s,
        bubble=bubble_s / step_s,
        exposed_tp=micro_batches * slowest.exposed_tp_s / step_s,
        tokens_per_s_per_gpu=tokens_per_s,
        mfu=flops * tokens_per_s / hardware.device.peak_flops,
        memory_gb=memory_bytes(config, dp) / 1e9,
    )


@dataclass(frozen=True)
class _Stage:
    """One micro-batch through all chunks of a pipeline stage."""

    forward_s: float
    backward_s: float
    exposed_tp_s: float
    """Of both."""


def _stage_seconds(config: TrainConfig, hardware: Hardware, stage: int) -> _Stage:
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    sp, seq_length = parallel.sequence_parallel, config.data.seq_length
    tokens = config.micro_batch_size * seq_length
    state = BF16 * tokens * model.hidden_size
    link = hardware.link_for(tp)
    attention, mlp = submodules(model, hardware, tokens=tokens, seq_length=seq_length, tp=tp, sp=sp)
    layers = model.num_layers // (pp * parallel.num_chunks)
    kinds = model.layer_residuals()
    forward = backward = alone = 0.0
    for chunk in range(parallel.num_chunks):
        begin = (chunk * pp + stage) * layers
        chunk_kinds = kinds[begin : begin + layers]
        both = [
            pass_seconds(
                chunk_kinds,
                attention,
                mlp,
                collective_s,
                sequence_parallel=sp,
                recompute=config.recompute,
            )
            for collective_s in (link.all_reduce_seconds(state), 0.0)
        ]
        forward += both[0][0]
        backward += both[0][1]
        alone += sum(both[1])
    exposed = forward + backward - alone
    # The embedding sums its parts over the vocabulary (forward); so does the head its input's
    # gradient (backward). With sequence parallelism each is half, in both passes.
    embedding_s = hardware.memory_s(2 * state)
    whole, half = link.all_reduce_seconds(state), link.half_seconds(state)
    if stage == 0:
        forward += embedding_s + (half if sp else whole)
        backward += embedding_s + (half if sp else 0.0)
        exposed += whole
    if stage == pp - 1:
        logits = tokens * model.padded_vocab_size / tp
        gemm_s = hardware.gemm_s(2.0 * logits * model.hidden_size)
        # fp32 logits are read and written about four times by the loss, and twice in backward; the
        # weight gradient hides the input gradient's collective.
        gradient_exposed = max(0.0, (half if sp else whole) - gemm_s)
        forward += gemm_s + hardware.memory_s(4 * FP32 * logits) + (half if sp else 0.0)
        backward += 2 * gemm_s + hardware.memory_s(2 * FP32 * logits) + gradient_exposed
        exposed += gradient_exposed + (half if sp else 0.0)
    return _Stage(forward, backward, exposed)


def _transfers_seconds(config: TrainConfig, hardware: Hardware, stage: _Stage) -> float:
    """Exposed sends of one micro-batch. With ladder layers two states cross a boundary, not one."""
    model, parallel = config.model, config.parallel
    if parallel.pipeline_model_parallel_size == 1:
        return 0.0
    states = 2 if "ladder" in model.layer_residuals() else 1
    cut = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    tokens = config.micro_batch_size * config.data.seq_length
    send_s = hardware.network.seconds(BF16 * states * tokens * model.hidden_size / cut)
    chunks = parallel.num_chunks
    if chunks == 1:
        return 2 * send_s
    return sum(max(0.0, chunks * send_s - s) for s in (stage.forward_s, stage.backward_s))


def _data_parallel_network(hardware: Hardware, tp: int) -> Network:
    """A ring over a data-parallel group leaves a node once, by the NICs of all its GPUs there."""
    per_node = max(1, GPUS_PER_NODE // tp)
    rate = min(NVLINK.bytes_per_s, per_node * hardware.network.bytes_per_s)
    return Network(hardware.network.latency_s, rate)


def plan(options: PlanOptions) -> list[Row]:
    """Every layout that `train` accepts and memory holds, of each residual kind, fastest first.

    Raises:
        UserError: no such preset, or no layout fits.
    """
    base, hardware = options.config(), options.hardware()
    usable = USABLE_MEMORY * hardware.device.memory_bytes
    candidates = list(_candidates(base, options.gpus))
    if not candidates:
        raise UserError(
            f"no layout of {options.preset} on {options.gpus} GPUs divides a global batch of "
            f"{base.global_batch_size} sequences: change --global-batch-size or --gpus"
        )
    rows = []
    least = float("inf")
    for config in candidates:
        nbytes = memory_bytes(config, config.parallel.data_parallel_size(options.gpus))
        least = min(least, nbytes)
        if nbytes <= usable:
            rows.append(estimate(config, options.gpus, hardware))
    if not rows:
        raise UserError(
            f"{options.preset} does not fit {options.gpus} x {options.device}: the smallest layout "
            f"takes {least / 1e9:.0f} GB of {usable / 1e9:.0f} GB usable on each. Take more --gpus, or "
            "a shorter --seq-length"
        )
    return sorted(rows, key=lambda row: (RESIDUALS.index(row.residual), row.step_s))  # type: ignore[arg-type]


def _candidates(base: TrainConfig, gpus: int) -> Iterator[TrainConfig]:
    """Even layouts that `train` would accept; its own checks decide."""
    powers = [2**i for i in range(gpus.bit_length())]
    stages = [pp for pp in range(1, base.model.num_layers + 1) if base.model.num_layers % pp == 0]
    for tp in powers:
        for pp in stages:
            if gpus % (tp * pp):
                continue
            for vpp in (1, 2, 4) if pp > 1 else (1,):
                parallel = ParallelConfig(
                    tensor_model_parallel_size=tp,
                    sequence_parallel=tp > 1 and base.data.seq_length % tp == 0,
                    pipeline_model_parallel_size=pp,
                    virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
                )
                for micro_batch in (1, 2, 4):
                    layout = replace(base, parallel=parallel, micro_batch_size=micro_batch)
                    try:
                        check_layout(layout.model, parallel)
                        layout.num_microbatches(parallel.data_parallel_size(gpus))
                    except UserError:
                        continue
                    for recompute in RECOMPUTES:
                        for residual in RESIDUALS:
                            model = replace(base.model, residual=residual, ladder_layers=None)
                            yield replace(layout, model=model, recompute=recompute)


def header(options: PlanOptions) -> str:
    """What the figures are, and what they rest on."""
    config, device = options.config(), DEVICES[options.device]
    link = options.link or f"nvswitch (two-nodes beyond {GPUS_PER_NODE} ranks)"
    return (
        f"Modelled, not measured: {options.preset} on {options.gpus} x {device.name}, sequences of "
        f"{config.data.seq_length}, {config.global_batch_size} a step, {'fp8' if options.fp8 else 'bf16'}.\n"
        f"Assumed: GEMMs reach {options.gemm_efficiency:.0%} and attention {options.attention_efficiency:.0%} "
        f"of the peak; tensor-parallel link {link}; network\n"
        f"{options.network_gbit_per_s:g} Gb/s a GPU; a hidden collective slows no compute, which flatters "
        "ladder. docs/planner.md has the rest."
    )


def table(rows: list[Row], top: int) -> str:
    """The best `top` layouts of each kind.

    Gains are standard's step time over the row's: the best standard layout's, and the same layout's.
    """
    out = [
        f"{'kind':9} {'TP':>2} {'PP':>3} {'VPP':>3} {'DP':>4} {'micro':>5} {'recompute':9} {'step s':>8} "
        f"{'tok/s/GPU':>9} {'MFU':>6} {'GB':>5} {'bubble':>6} {'TP exp.':>7} {'vs best':>7} {'vs same':>7}"
    ]
    standard = {row.layout: row for row in rows if row.residual == "standard"}
    best = min((row.step_s for row in standard.values()), default=None)
    for kind in RESIDUALS:
        for row in [r for r in rows if r.residual == kind][:top]:
            same = standard.get(row.layout)
            gains = [best, same.step_s if same else None]
            out.append(
                f"{row.residual:9} {row.tp:>2} {row.pp:>3} {row.vpp:>3} {row.dp:>4} "
                f"{row.micro_batch_size:>5} {row.recompute:9} {row.step_s:8.3f} "
                f"{row.tokens_per_s_per_gpu:9.0f} {row.mfu:6.1%} {row.memory_gb:5.1f} {row.bubble:6.1%} "
                f"{row.exposed_tp:7.1%} "
                + " ".join(f"{s / row.step_s:6.3f}x" if s else f"{'-':>7}" for s in gains)
            )
    out.append(
        "vs best, vs same: step time of the best standard layout, and of standard at the same layout, over "
        "this one's (-: out of memory)."
    )
    return "\n".join(out)


def draw(rows: list[Row], title: str) -> bytes:
    """The best layout of each kind, broken in parts, as PNG."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from pretrain.plots import COLOURS

    best = [next(r for r in rows if r.residual == k) for k in {r.residual: None for r in rows}]
    parts = {
        "compute": "compute_s",
        "exposed TP communication": "exposed_tp_s",
        "pipeline bubble": "bubble_s",
        "exposed stage transfers": "transfers_s",
        "exposed DP communication": "exposed_dp_s",
    }
    figure = Figure(figsize=(8.6, 1.8 + 0.6 * len(best)), layout="constrained")
    axes = figure.add_subplot()
    labels = [
        f"{r.residual}\nTP {r.tp} PP {r.pp} VPP {r.vpp} DP {r.dp}, {r.recompute}" for r in best
    ]
    left = [0.0] * len(best)
    for (name, part), colour in zip(parts.items(), COLOURS, strict=False):
        widths = [getattr(row, part) for row in best]
        axes.barh(labels, widths, left=left, color=colour, label=name, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds a step, modelled, not measured")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def main_plan(options: PlanOptions) -> int:
    """Prints the table; writes JSON and PNG where asked."""
    rows = plan(options)
    print(header(options))
    print(table(rows, options.top))
    if options.json:
        content = {
            "modelled_not_measured": header(options),
            "options": to_dict(options),
            "rows": [asdict(row) for row in rows],
        }
        write_atomically(options.json, json.dumps(content, indent=1) + "\n")
    if options.png:
        title = f"{options.preset}, {options.gpus} x {DEVICES[options.device].name}"
        write_atomically(options.png, draw(rows, title))
    return 0
