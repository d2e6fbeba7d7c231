"""Builds data parallelism, the optimizer and the learning-rate schedule with megatron-core."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from pretrain.config.train import TrainConfig
from pretrain.optim.ema import Ema
from pretrain.optim.muon import Muon
from pretrain.optim.torch_adam import use_fused_kernel


def wrap_data_parallel(
    chunks: list[Any], *, gather_at_once: bool = False
) -> list[DistributedDataParallel]:
    """Wraps this rank's chunks in megatron-core's DDP.

    Gradients are summed in fp32 over the data- and context-parallel ranks, overlapped with backward. The
    optimizer's state is sharded over these ranks. The updated parameters are gathered during the next
    forward.

    Args:
        chunks: from `build_gpt_model`; all share one configuration object, which the schedules read.
        gather_at_once: gather the parameters directly after the update, before the next forward. Compiled
            layers cannot wait for parameters during forward. A CUDA graph cannot either, because the update
            is not part of it.
    """
    config = chunks[0].config
    assert all(chunk.config is config for chunk in chunks)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=True,
        overlap_param_gather=not gather_at_once
        and parallel_state.get_data_parallel_world_size(True) > 1,
        use_distributed_optimizer=True,
        fp8_param_gather=config.fp8_param,
    )
    model = [
        # The gradients of a later chunk are reduced while the backward of earlier chunks runs. So they need
        # not be split into buckets.
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    for chunk in model:
        for module in chunk.modules():
            # Lets Transformer Engine's GEMMs add weight gradients directly to DDP's fp32 buffer.
            # megatron-core's own flag for this also requires apex, for the output layer.
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True
    config.finalize_model_grads_func = finalize_model_grads
    no_sync = [chunk.no_sync for chunk in model]
    # Gradients are accumulated first, and reduced in the last micro-batch.
    config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
    return model


@contextlib.contextmanager
def gathered_parameters(model: list[DistributedDataParallel]) -> Iterator[None]:
    """Inside this block every rank holds all parameters of the last update: for validation and saving.

    Where the gathering overlaps forward, it is completed first, and switched on again after the block.
    """
    overlapped = [c for c in model if c.ddp_config.overlap_param_gather]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook()
    yield
    for chunk in overlapped:
        chunk.enable_forward_pre_hook()


def build_optimizer(model: list[DistributedDataParallel], config: TrainConfig) -> Any:
    """AdamW, and Muon where the configuration says so. Their state is sharded over data- and
    context-parallel ranks; in bf16 with fp32 master weights.

    Args:
        model: from `wrap_data_parallel`.

    Returns:
        megatron-core's chained optimizer; in its `ema` the average of the weights (None: none is kept), and
        in its `muon` what updates the layers' matrices (None: AdamW).
    """
    o = config.optimizer
    moments = torch.bfloat16 if o.moments == "bf16" else torch.float32
    optimizer_config = McoreOptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.lr * config.schedule.min_lr_fraction,
        weight_decay=o.weight_decay,
        adam_beta1=o.adam_beta1,
        adam_beta2=o.adam_beta2,
        adam_eps=o.adam_eps,
        clip_grad=o.clip_grad,
        bf16=config.precision == "bf16",
        params_dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=model[0].ddp_config.overlap_param_gather,
        use_precision_aware_optimizer=o.moments != "fp32",
        store_param_remainders=False,  # master weights stay fp32, whole
        exp_avg_dtype=moments,
        exp_avg_sq_dtype=moments,
    )
    optimizer = get_megatron_optimizer(
        optimizer_config,
        model,
        config_overrides=get_standard_config_overrides(optimizer_config),
        use_gloo_process_groups=False,
    )
    use_fused_kernel(optimizer)
    optimizer.muon = Muon(optimizer, o.muon_momentum) if o.optimizer == "muon" else None
    optimizer.ema = None if o.ema_decay is None else Ema(optimizer, o.ema_decay)
    return optimizer


def gradient_norm(optimizer: Any) -> float:
    """The norm of all gradients of the model, before clipping. It does not change the gradients."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def update(optimizer: Any, grad_norm: float) -> None:
    """Clips the gradients and updates the parameters, as megatron-core's `step` does, with a known norm.

    megatron-core's `step` would compute the norm again, which takes a pass over the gradients and makes the
    host wait.

    Args:
        grad_norm: of these gradients, from `gradient_norm`.
    """
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if part.config.clip_grad > 0 and parameters:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    if optimizer.muon:
        optimizer.muon.step()
    optimizer.step_with_ready_grads()
    if optimizer.ema:
        optimizer.ema.update()


def build_scheduler(optimizer: Any, config: TrainConfig) -> OptimizerParamScheduler:
    """The learning rate of each step: a linear warm-up, then cosine, or constant and linear decay (WSD)."""
    peak, total = config.optimizer.lr, config.train_steps
    style = "WSD" if config.schedule.decay == "wsd" else "cosine"
    if style == "WSD" and config.wsd_decay_steps == 0:
        style = "constant"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=peak,
        min_lr=peak * config.schedule.min_lr_fraction,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=total,
        lr_decay_style=style,
        wsd_decay_steps=config.wsd_decay_steps,
        lr_wsd_decay_style="linear",
        start_wd=config.optimizer.weight_decay,
        end_wd=config.optimizer.weight_decay,
        wd_incr_steps=total,
        wd_incr_style="constant",
    )


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of one step, counted from 1, by the run's schedule."""
    scheduler = build_scheduler(SimpleNamespace(param_groups=[]), config)
    scheduler.num_steps = step
    return scheduler.get_lr({})
