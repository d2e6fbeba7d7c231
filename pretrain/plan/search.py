"""Layouts of a model on a cluster: the step time of each, by planner.py's model, and the fastest ones."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tqdm import tqdm

from megatron_ladder.config import (
    STALE,
    ModelConfig,
    ParallelConfig,
    Recompute,
    Residual,
    TpOverlap,
    check_layout,
)
from megatron_ladder.errors import UserError
from megatron_ladder.fields.stages import chunks_of_stages
from megatron_ladder.fields.windows import attention_length
from pretrain.config.train import TrainConfig
from pretrain.plan.expert_times import expert_layer, experts_pass_seconds
from pretrain.plan.experts import expert_ranks, has_experts
from pretrain.plan.memory import memory_plan, room, stage_layers, stage_parameters
from pretrain.plan.planner import (
    BF16,
    FP32,
    Device,
    Hardware,
    pass_seconds,
    submodules,
)
from pretrain.plan.ring import gathers, ring_seconds
from pretrain.run.metrics import flops_per_token

KINDS: tuple[Residual, ...] = ("standard", "parallel", "ladder", "parallel-ladder")
WAYS: tuple[tuple[Residual, TpOverlap], ...] = (
    ("standard", "none"),
    ("standard", "halves"),
    ("parallel", "none"),
    ("parallel", "halves"),
    ("ladder", "none"),
    ("parallel-ladder", "none"),
)
LESS_IN_LAST_STAGE = 4
"""By how many layers the last pipeline stage may be shorter, because it has the output head."""

LEAST_TOKENS = 8192
"""Context parallelism is tried where a rank keeps at least so many tokens of a sequence."""


@dataclass(frozen=True)
class Row:
    """One layout of one residual kind. Shares are of step_s; times in seconds, modelled."""

    residual: str
    halves: bool
    tp: int
    cp: int
    pp: int
    last_stage: int
    """Layers of the last pipeline stage; the others share the rest."""
    vpp: int
    dp: int
    ep: int
    sequence_parallel: bool
    micro_batch_size: int
    recompute: Recompute
    step_s: float
    compute_s: float
    exposed_tp_s: float
    exposed_cp_s: float
    exposed_ep_s: float
    """All-to-alls of experts."""
    exposed_dp_s: float
    transfers_s: float
    """Transfers between pipeline stages that no compute hides."""
    bubble_s: float
    tokens_per_s_per_gpu: float
    mfu: float
    """The share of the bf16 peak, also with FP8; recomputation does not count."""
    memory_gb: float

    @property
    def layout(self) -> tuple[object, ...]:
        """All but the residual kind and the halves."""
        layout = (
            self.tp,
            self.cp,
            self.pp,
            self.last_stage,
            self.vpp,
            self.dp,
            self.ep,
            self.sequence_parallel,
        )
        return (*layout, self.micro_batch_size, self.recompute)

    @property
    def bubble(self) -> float:
        return self.bubble_s / self.step_s

    @property
    def exposed_tp(self) -> float:
        return self.exposed_tp_s / self.step_s

    @property
    def exposed_ep(self) -> float:
        return self.exposed_ep_s / self.step_s

    @property
    def hides(self) -> bool:
        """Whether there are collectives that a ladder kind can hide."""
        return self.tp > 1 or self.ep > 1


# Layouts share many passes.
_pass_seconds = functools.lru_cache(maxsize=100_000)(pass_seconds)
_experts_pass_seconds = functools.lru_cache(maxsize=100_000)(experts_pass_seconds)


def ways(model: ModelConfig) -> tuple[tuple[Residual, TpOverlap], ...]:
    """The ways of a model: halves do not go with experts."""
    return tuple(w for w in WAYS if w[1] == "none" or not has_experts(model))


def way(residual: Residual, overlap: TpOverlap) -> str:
    """The name of a residual kind and of how its collectives are hidden: "standard", "standard, halves"."""
    return f"{residual}, halves" if overlap == "halves" else residual


def row(config: TrainConfig, gpus: int, hardware: Hardware, attended: float | None = None) -> Row:
    """The time of one layout's step. A model, not a measurement.

    - Every stage takes as long as the slowest one. The last one has the output head.
    - A chunk's last collective is exposed, because none may be under way across a stage's boundary.
    - The bubble is (pp - 1) times a chunk's forward and backward.
    - Transfers between stages are exposed: in 1F1B twice for each micro-batch, in the interleaved schedule
      only while the pipeline fills.
    - Stages and data-parallel ranks send over the network; where one node has all GPUs, over its own links.
    - Data and context parallelism reduce gradients (fp32) during the last backward, and gather parameters
      (bf16) during the first forward. What takes longer than these is exposed.
    - The all-to-alls of experts are hidden as `experts_pass_seconds` says. Every rank waits for the
      fullest.
    - In context parallelism what sending keys and values takes longer than attention is exposed; all of it
      where they are gathered (documents apart, windows, torch's attention).

    Args:
        config: with the layout.
        gpus: the number of GPUs.
        attended: tokens that attention works on together (attended.py). None: those of whole sequences.
    """
    model, parallel, seq_length = config.model, config.parallel, config.data.seq_length
    if attended is None:
        attended = attention_length(model, [seq_length])
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    chunks, sp = parallel.num_chunks, parallel.sequence_parallel
    cp, dp = parallel.context_parallel_size, parallel.data_parallel_size(gpus)
    micro_batches = config.num_microbatches(dp)
    halves = parallel.tp_overlap == "halves"
    tokens = config.micro_batch_size * seq_length // cp
    state = BF16 * tokens * model.hidden_size
    calls = 2 if halves else 1
    attention, mlp = submodules(
        model, hardware, tokens=tokens // calls, seq_length=attended, tp=tp, sp=sp
    )
    ring_s, ring_back_s = ring_seconds(
        model,
        hardware,
        tokens=tokens // calls,
        seq_length=attended,
        tp=tp,
        cp=cp,
        gathers=gathers(config),
    )
    attention = replace(
        attention,
        forward_s=attention.forward_s + ring_s,
        backward_s=attention.backward_s + ring_back_s,
    )
    again = 2 if config.recompute == "full" else 1
    layer_ring_s = calls * (again * ring_s + ring_back_s)
    link_s = hardware.link_for(tp).all_reduce_seconds(state / calls) if tp > 1 else 0.0
    head_s = 3 * hardware.gemm_s(2.0 * tokens * model.hidden_size * model.padded_vocab_size / tp)
    have_experts = model.experts.layers(model.num_layers)
    kinds = tuple(zip(model.layer_residuals(), have_experts, strict=True))
    stages = [
        [kinds[chunk.start : chunk.stop] for chunk in stage]
        for stage in chunks_of_stages(model.num_layers, parallel)
    ]
    experts = expert_layer(config, hardware) if has_experts(model) else None

    def one_pass(
        part: tuple[tuple[Residual, bool], ...], collective_s: float, exchanges: bool
    ) -> tuple[float, float]:
        if experts is None:
            return _pass_seconds(
                *(tuple(kind for kind, _ in part), attention, mlp, collective_s),
                sequence_parallel=sp,
                recompute=config.recompute,
                halves=halves,
            )
        given = experts if exchanges else experts.without_exchanges()
        again = config.recompute == "full"
        return _experts_pass_seconds(part, attention, mlp, given, collective_s, recompute=again)

    def seconds(collective_s: float, exchanges: bool = True) -> list[tuple[float, float]]:
        """Forward and backward of each stage's layers, for one micro-batch."""
        parts = set(itertools.chain(*stages))
        passes = {part: one_pass(part, collective_s, exchanges) for part in parts}
        found = [[passes[part] for part in stage] for stage in stages]
        return [(sum(f for f, _ in stage), sum(b for _, b in stage)) for stage in found]

    times = seconds(link_s)
    slowest = max(range(pp), key=lambda i: sum(times[i]) + (head_s if i == pp - 1 else 0.0))
    forward_s, backward_s = times[slowest]
    stage_s = forward_s + backward_s
    without_tp_s = sum(seconds(0.0)[slowest]) if link_s or experts is None else stage_s
    own_stage_s = without_tp_s if experts is None else sum(seconds(0.0, False)[slowest])
    if slowest < pp - 1:
        head_s = 0.0

    exposed_cp_s = micro_batches * stage_layers(config)[slowest] * layer_ring_s
    compute_s = micro_batches * (own_stage_s + head_s) - exposed_cp_s
    exposed_tp_s = micro_batches * (stage_s - without_tp_s)
    exposed_ep_s = micro_batches * (without_tp_s - own_stage_s)
    bubble_s = (pp - 1) * (stage_s + head_s) / chunks
    sent = state * (2 if STALE.intersection(model.layer_residuals()) else 1) / (tp if sp else 1)
    sends = 0 if pp == 1 else 2 * (micro_batches if chunks == 1 else pp - 1)
    network = hardware.between(gpus)
    transfers_s = sends * network.seconds(sent)
    shared, routed = stage_parameters(config, 0)
    copies = expert_ranks(config, dp) if routed else 1
    parameters = shared * (dp * cp - 1) / (dp * cp) + routed * (copies - 1) / copies
    gradients_s = network.seconds(FP32 * parameters)
    gather_s = network.seconds(BF16 * parameters)
    exposed_dp_s = max(0.0, gradients_s - backward_s) + max(0.0, gather_s - forward_s)
    exposed_s = exposed_tp_s + exposed_cp_s + exposed_ep_s + exposed_dp_s
    step_s = compute_s + exposed_s + bubble_s + transfers_s
    flops = config.tokens_per_step * flops_per_token(
        num_layers=model.num_layers,
        attention_width=model.attention_width,
        seq_length=attended,
        matmul_parameters=model.num_matmul_parameters(),
    )
    return Row(
        residual=model.residual,
        halves=halves,
        tp=tp,
        cp=cp,
        pp=pp,
        last_stage=stage_layers(config)[-1],
        vpp=chunks,
        dp=dp,
        ep=parallel.expert_model_parallel_size,
        sequence_parallel=sp,
        micro_batch_size=config.micro_batch_size,
        recompute=config.recompute,
        step_s=step_s,
        compute_s=compute_s,
        exposed_tp_s=exposed_tp_s,
        exposed_cp_s=exposed_cp_s,
        exposed_ep_s=exposed_ep_s,
        exposed_dp_s=exposed_dp_s,
        transfers_s=transfers_s,
        bubble_s=bubble_s,
        tokens_per_s_per_gpu=config.tokens_per_step / step_s / gpus,
        mfu=flops / (gpus * hardware.device.peak_flops * step_s),
        memory_gb=memory_plan(config, dp).total / 1e9,
    )


def layouts(config: TrainConfig, gpus: int, overlap: TpOverlap = "none") -> Iterator[TrainConfig]:
    """Layouts of `config` on this number of GPUs that the trainer accepts.

    Not all of them: TP is a power of two, with sequence parallelism; CP is one too, and leaves a rank
    LEAST_TOKENS of a sequence; PP divides the layers; VPP is 1, 2 or 4; a micro-batch has up to 16
    sequences, a power of two; EP is a power of two.
    """
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= gpus]
    contexts = [1] + [n for n in sizes[1:] if config.data.seq_length >= LEAST_TOKENS * n]
    experts = config.model.experts.num_moe_experts or 1
    divisions = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= experts]
    stages = [n for n in range(1, config.model.num_layers + 1) if config.model.num_layers % n == 0]
    # "selective" is left out: flash attention keeps no scores, so there is nothing to gain.
    recomputes: tuple[Recompute, ...] = ("none", "full")
    lasts = range(LESS_IN_LAST_STAGE + 1)
    for tp, cp, pp, ep, less, chunks, micro, recompute in itertools.product(
        *(sizes, contexts, stages, divisions, lasts, (1, 2, 4), (1, 2, 4, 8, 16), recomputes)
    ):
        ranks = tp * cp * pp
        if ranks > gpus or gpus % ranks or (pp == 1 and (chunks > 1 or less)):
            continue
        if gpus // pp % ep:
            continue
        last = config.model.num_layers // pp - less
        try:
            parallel = ParallelConfig(
                tensor_model_parallel_size=tp,
                sequence_parallel=tp > 1,
                pipeline_model_parallel_size=pp,
                virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
                num_layers_in_last_pipeline_stage=last if less else None,
                context_parallel_size=cp,
                expert_model_parallel_size=ep,
                tp_overlap=overlap,
            )
            check_layout(config.model, parallel)
            laid_out = replace(
                config, parallel=parallel, micro_batch_size=micro, recompute=recompute
            )
            laid_out.check_batches(parallel.data_parallel_size(gpus))
        except UserError:
            continue
        yield laid_out


def fitting(config: TrainConfig, gpus: int, device: Device) -> dict[str, list[TrainConfig]]:
    """The layouts that fit in memory, by `way`. Halves need several tensor-parallel ranks: they may be
    missing.

    Raises:
        UserError: no layout divides over the GPUs, or none fits in memory.
    """
    limit = room(device.memory_bytes)
    found = {}
    all_ways = ways(config.model)
    for kind, overlap in tqdm(all_ways, "layouts that fit", leave=False, unit="way", disable=None):
        layers = config.model.ladder_layers if kind in STALE else None  # a hybrid's
        model = replace(config.model, residual=kind, ladder_layers=layers)
        candidates = list(layouts(replace(config, model=model), gpus, overlap))
        if not candidates and overlap == "none":
            raise UserError(
                f"this model cannot be divided over {gpus} GPUs with global_batch_size "
                f"{config.global_batch_size}: no layout is possible. Change one of the two"
            )
        fits = [
            c
            for c in candidates
            if memory_plan(c, c.parallel.data_parallel_size(gpus)).total <= limit
        ]
        if not fits and overlap == "none":
            raise UserError(
                f"no layout fits in {device.memory_bytes / 1e9:.0f} GB a GPU: "
                "use more GPUs, or a shorter --seq-length"
            )
        if fits:
            found[way(kind, overlap)] = fits
    return found


def ranked(
    fits: dict[str, list[TrainConfig]], gpus: int, hardware: Hardware
) -> dict[str, list[Row]]:
    """The times of these layouts, the fastest of each way first."""
    found = {}
    count = sum(map(len, fits.values()))
    with tqdm(total=count, desc="step times", leave=False, unit="layout", disable=None) as bar:
        for name, configs in fits.items():
            found[name] = sorted((row(c, gpus, hardware) for c in configs), key=lambda r: r.step_s)
            bar.update(len(configs))
    return found


def search(config: TrainConfig, gpus: int, hardware: Hardware) -> dict[str, list[Row]]:
    """The layouts that fit in memory, by `way`, the fastest first.

    Raises:
        UserError: no layout divides over the GPUs, or none fits in memory.
    """
    return ranked(fitting(config, gpus, hardware.device), gpus, hardware)
