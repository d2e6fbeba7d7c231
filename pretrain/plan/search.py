"""Layouts of a model on a cluster: the step time of each, by planner.py's model, and the fastest ones."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

from megatron_ladder.config import ParallelConfig, Recompute, Residual, check_layout
from megatron_ladder.errors import UserError
from pretrain.config.train import TrainConfig
from pretrain.plan.memory import memory_plan, room, stage_parameters
from pretrain.plan.planner import BF16, FP32, Hardware, Row, pass_seconds, submodules
from pretrain.run.metrics import flops_per_token

KINDS: tuple[Residual, ...] = ("standard", "parallel", "ladder")


def row(config: TrainConfig, gpus: int, hardware: Hardware) -> Row:
    """The time of one layout's step. A model, not a measurement.

    - Every stage takes as long as the last one, which has the output head.
    - A chunk's last collective is exposed, because none may be under way across a stage's boundary.
    - The bubble is (pp - 1) times a chunk's forward and backward.
    - Transfers between stages are exposed: in 1F1B twice for each micro-batch, in the interleaved schedule
      only while the pipeline fills.
    - Data parallelism reduces gradients (fp32) during the last backward, and gathers parameters (bf16)
      during the first forward. What takes longer than these is exposed.

    Args:
        config: with the layout.
        gpus: the number of GPUs.
    """
    model, parallel, seq_length = config.model, config.parallel, config.data.seq_length
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    chunks, sp = parallel.num_chunks, parallel.sequence_parallel
    dp = parallel.data_parallel_size(gpus)
    micro_batches = config.num_microbatches(dp)
    tokens = config.micro_batch_size * seq_length

    attention, mlp = submodules(model, hardware, tokens=tokens, seq_length=seq_length, tp=tp, sp=sp)
    state = BF16 * tokens * model.hidden_size
    link_s = hardware.link_for(tp).all_reduce_seconds(state) if tp > 1 else 0.0
    layers = model.layer_residuals()[: model.num_layers // (pp * chunks)]
    forward_s, backward_s = pass_seconds(
        layers, attention, mlp, link_s, sequence_parallel=sp, recompute=config.recompute
    )
    own_forward_s, own_backward_s = pass_seconds(
        layers, attention, mlp, 0.0, sequence_parallel=sp, recompute=config.recompute
    )
    chunk_s, own_chunk_s = forward_s + backward_s, own_forward_s + own_backward_s
    head_s = 3 * hardware.gemm_s(2.0 * tokens * model.hidden_size * model.padded_vocab_size / tp)

    compute_s = micro_batches * (chunks * own_chunk_s + head_s)
    exposed_tp_s = micro_batches * chunks * (chunk_s - own_chunk_s)
    bubble_s = (pp - 1) * (chunk_s + head_s / chunks)
    sent = state * (2 if model.residual == "ladder" else 1) / (tp if sp else 1)
    sends = 0 if pp == 1 else 2 * (micro_batches if chunks == 1 else pp - 1)
    transfers_s = sends * hardware.network.seconds(sent)
    parameters = stage_parameters(config, first=True, last=pp == 1) * (dp - 1) / dp
    gradients_s = hardware.network.seconds(FP32 * parameters)
    gather_s = hardware.network.seconds(BF16 * parameters)
    exposed_dp_s = max(0.0, gradients_s - chunks * backward_s) + max(
        0.0, gather_s - chunks * forward_s
    )
    step_s = compute_s + exposed_tp_s + bubble_s + transfers_s + exposed_dp_s
    flops = config.tokens_per_step * flops_per_token(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        seq_length=model.attention_length(seq_length),
        matmul_parameters=model.num_matmul_parameters(),
    )
    return Row(
        residual=model.residual,
        tp=tp,
        pp=pp,
        vpp=chunks,
        dp=dp,
        sequence_parallel=sp,
        micro_batch_size=config.micro_batch_size,
        recompute=config.recompute,
        step_s=step_s,
        compute_s=compute_s,
        exposed_tp_s=exposed_tp_s,
        exposed_dp_s=exposed_dp_s,
        transfers_s=transfers_s,
        bubble_s=bubble_s,
        tokens_per_s_per_gpu=config.tokens_per_step / step_s / gpus,
        mfu=flops / (gpus * hardware.device.peak_flops * step_s),
        memory_gb=memory_plan(config, dp).total / 1e9,
    )


def layouts(config: TrainConfig, gpus: int) -> Iterator[TrainConfig]:
    """Every layout of `config` on this number of GPUs that the trainer accepts."""
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= gpus]
    stages = [n for n in range(1, config.model.num_layers + 1) if config.model.num_layers % n == 0]
    # "selective" is left out: flash attention keeps no scores, so there is nothing to gain.
    recomputes: tuple[Recompute, ...] = ("none", "full")
    for tp, pp, chunks, micro, recompute in itertools.product(
        sizes, stages, (1, 2, 4), (1, 2, 4), recomputes
    ):
        if tp * pp > gpus or gpus % (tp * pp) or (pp == 1 and chunks > 1):
            continue
        try:
            parallel = ParallelConfig(
                tensor_model_parallel_size=tp,
                sequence_parallel=tp > 1,
                pipeline_model_parallel_size=pp,
                virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            )
            check_layout(config.model, parallel)
            laid_out = replace(
                config, parallel=parallel, micro_batch_size=micro, recompute=recompute
            )
            laid_out.num_microbatches(parallel.data_parallel_size(gpus))
        except UserError:
            continue
        yield laid_out


def search(config: TrainConfig, gpus: int, hardware: Hardware) -> dict[Residual, list[Row]]:
    """The layouts of each residual kind that fit in memory, the fastest first.

    Raises:
        UserError: no layout divides over the GPUs, or none fits in memory.
    """
    limit = room(hardware.device.memory_bytes)
    found: dict[Residual, list[Row]] = {}
    for kind in KINDS:
        model = replace(config.model, residual=kind, ladder_layers=None)
        candidates = list(layouts(replace(config, model=model), gpus))
        if not candidates:
            raise UserError(
                f"this model cannot be divided over {gpus} GPUs with global_batch_size "
                f"{config.global_batch_size}: no layout is possible. Change one of the two"
            )
        rows = [
            row(c, gpus, hardware)
            for c in candidates
            if memory_plan(c, c.parallel.data_parallel_size(gpus)).total <= limit
        ]
        if not rows:
            raise UserError(
                f"no layout fits in {hardware.device.memory_bytes / 1e9:.0f} GB a GPU: "
                "use more GPUs, or a shorter --seq-length"
            )
        found[kind] = sorted(rows, key=lambda r: r.step_s)
    return found
